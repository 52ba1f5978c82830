// Reader and xxh3_64 for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "disk/reader.h"
#include "disk/xxh3.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;
using RunTuple = std::tuple<int, std::uint64_t, std::size_t>;

constexpr std::chrono::milliseconds kSignalCheck{100};

nb::tuple arguments(const ReadFailure& failure) {
  return nb::make_tuple(failure.what(), failure.kind_name(), failure.path, failure.offset, failure.error);
}

// The arguments of Python's exception are (message, kind, path, offset, errno).
void register_failure(nb::module_& m) {
  const nb::handle type = nb::exception<ReadFailure>(m, "ReadFailure", PyExc_RuntimeError);
  nb::register_exception_translator(
      [](const std::exception_ptr& error, void* python_type) {
        try {
          std::rethrow_exception(error);
        } catch (const ReadFailure& failure) {
          PyErr_SetObject(static_cast<PyObject*>(python_type), arguments(failure).ptr());
        }
      },
      type.ptr());
}

Reader::Ticket submit(Reader& reader, const std::vector<RunTuple>& tuples, nb::handle target, bool prefetch,
                      std::optional<std::uint64_t> checksum) {
  std::vector<Run> runs;
  std::optional<std::size_t> nbytes = 0;
  for (const auto& [file, offset, length] : tuples) {
    runs.push_back({file, offset, length});
    *nbytes += length;
  }
  const OutArray memory = writable(target, "target");
  check(Array(memory), "target", {Type::uint8}, {{"nbytes", nbytes}});
  return reader.submit(runs, elements<std::byte>(memory), prefetch, checksum);
}

// Waits without the GIL, and checks for Ctrl-C regularly; the ticket stays valid after it.
void wait(Reader& reader, Reader::Ticket ticket) {
  for (;;) {
    {
      const nb::gil_scoped_release unlocked;
      if (reader.wait_for(ticket, kSignalCheck)) return;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

Fault::Kind fault_kind(const std::string& name) {
  static constexpr const char* kNames[] = {"error", "shorten", "flip", "delay", "refuse_direct"};
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Fault::Kind>(i);
  value_error("kind: " + name + " given, error, shorten, flip, delay or refuse_direct needed");
}

std::uint64_t hash(const Array& data) {
  check_memory(data, "data");
  if (data.nbytes() < kXxh3Least)
    value_error("data: " + std::to_string(data.nbytes()) + " bytes given, at least " +
                std::to_string(kXxh3Least) + " needed");
  const nb::gil_scoped_release unlocked;
  return xxh3_64(static_cast<const std::byte*>(data.data()), data.nbytes());
}

}  // namespace

void register_reader(nb::module_& m) {
  register_failure(m);
  nb::class_<Reader>(m, "Reader")
      .def(nb::init<std::size_t, std::size_t>(), "depth_per_drive"_a, "piece_bytes"_a)
      .def("add_file", &Reader::add_file, "copies"_a, "direct"_a = true, Unlocked())
      .def("direct", &Reader::direct, "file"_a)
      .def("set_depth", &Reader::set_depth, "path"_a, "depth"_a)
      .def("submit", submit, "runs"_a, "target"_a, "prefetch"_a = false, "checksum"_a = nb::none())
      .def("ready", &Reader::ready, "ticket"_a)
      .def("wait", wait, "ticket"_a)
      .def("promote", &Reader::promote, "ticket"_a)
      .def("cancel", &Reader::cancel, "ticket"_a, Unlocked())
      .def("traffic",
           [](const Reader& reader) {
             std::vector<std::tuple<std::string, std::size_t, std::uint64_t, double>> all;
             for (const DriveTraffic& drive : reader.traffic())
               all.emplace_back(drive.folder, drive.depth, drive.bytes, drive.busy_s);
             return all;
           })
      .def("take_given_up",
           [](Reader& reader) {
             nb::list all;
             for (const ReadFailure& failure : reader.take_given_up()) all.append(arguments(failure));
             return all;
           })
      .def(
          "inject",
          [](Reader& reader, const std::string& prefix, const std::string& kind, std::int64_t value,
             std::size_t after,
             std::size_t count) { reader.inject({prefix, fault_kind(kind), value, after, count}); },
          "prefix"_a, "kind"_a, "value"_a = 0, "after"_a = 0, "count"_a = SIZE_MAX);
  m.def("xxh3_64", hash, "data"_a.noconvert());
}

}  // namespace moebox
