// ColdReader for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "decode/cold_reader.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

using Extent =
    std::pair<std::vector<std::tuple<int, std::uint64_t, std::size_t>>, std::optional<std::uint64_t>>;

ColdReader make_cold(RamRows& rows, Reader& reader, const std::vector<Extent>& given) {
  std::vector<ColdReader::Extent> extents;
  for (const auto& [tuples, checksum] : given) {
    auto& extent = extents.emplace_back(std::vector<Run>{}, checksum);
    for (const auto& [file, offset, nbytes] : tuples) extent.runs.push_back({file, offset, nbytes});
  }
  return {rows, reader, std::move(extents)};
}

}  // namespace

void register_cold_reader(nb::module_& m) {
  nb::class_<ColdReader>(m, "ColdReader")
      .def(
          "__init__",
          [](ColdReader* self, RamRows& rows, Reader& reader, const std::vector<Extent>& extents) {
            new (self) ColdReader(make_cold(rows, reader, extents));
          },
          "rows"_a, "reader"_a, "extents"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def_prop_ro("failed", &ColdReader::failed);
}

}  // namespace moebox
