// The copiers for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <random>
#include <string>

#include "arrays.h"
#include "device/cuda_copier.h"
#include "device/host_copier.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

void make_host_copier(HostCopier* self, std::optional<std::uint64_t> seed, double max_delay_us) {
  if (!(max_delay_us >= 0 && max_delay_us <= 1e6))
    value_error("max_delay_us: " + std::to_string(max_delay_us) + " given, 0 to 1000000 needed");
  new (self) HostCopier(seed ? *seed : std::random_device{}(), max_delay_us);
}

}  // namespace

void register_copiers(nb::module_& m) {
  nb::exception<DeviceFailure>(m, "DeviceFailure", PyExc_RuntimeError);
  nb::class_<Copier>(m, "Copier")
      .def("attach", &Copier::attach)
      .def("upload", &Copier::upload, "destination"_a, "source"_a, "nbytes"_a, Unlocked())
      .def("download", &Copier::download, "destination"_a, "source"_a, "nbytes"_a, Unlocked())
      .def("signal", &Copier::signal, "flag"_a, "one"_a, Unlocked())
      .def("clear", &Copier::clear, "destination"_a, "nbytes"_a, Unlocked())
      .def("synchronize", &Copier::synchronize, Unlocked())
      .def("error", &Copier::error, Unlocked());
  nb::class_<HostCopier, Copier>(m, "HostCopier")
      .def("__init__", make_host_copier, "seed"_a = nb::none(), "max_delay_us"_a = 0.0)
      .def("fail_after", &HostCopier::fail_after, "copies"_a);
  nb::class_<CudaCopier, Copier>(m, "CudaCopier")
      .def(nb::init<std::uintptr_t, std::uintptr_t>(), "upload_stream"_a, "download_stream"_a);
}

}  // namespace moebox
