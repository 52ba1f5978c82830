// ColdTier for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "decode/cold_rows.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

using Extent =
    std::pair<std::vector<std::tuple<int, std::uint64_t, std::size_t>>, std::optional<std::uint64_t>>;

ColdTier make_cold(Residency& residency, Reader& reader, const std::vector<Extent>& given) {
  std::vector<ColdTier::Extent> extents;
  for (const auto& [tuples, checksum] : given) {
    auto& extent = extents.emplace_back(std::vector<Run>{}, checksum);
    for (const auto& [file, offset, nbytes] : tuples) extent.runs.push_back({file, offset, nbytes});
  }
  return {residency, reader, std::move(extents)};
}

}  // namespace

void register_cold_rows(nb::module_& m) {
  nb::class_<ColdTier>(m, "ColdTier")
      .def(
          "__init__",
          [](ColdTier* self, Residency& residency, Reader& reader, const std::vector<Extent>& extents) {
            new (self) ColdTier(make_cold(residency, reader, extents));
          },
          "residency"_a, "reader"_a, "extents"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def_prop_ro("failed", &ColdTier::failed);
}

}  // namespace moebox
