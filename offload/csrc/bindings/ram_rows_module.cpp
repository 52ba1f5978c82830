// RamRows for Python.
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "module.h"
#include "residency/ram_rows.h"
#include "residency_binding.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

using Table = nb::ndarray<std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = std::vector<std::int32_t>;

std::int32_t with_row(RamRows& rows, std::int64_t key) {
  const std::int32_t valid = checked(rows.residency(), key);
  if (rows.residency().slot(valid) < 0) value_error("key: " + std::to_string(key) + " has no row");
  return valid;
}

std::int32_t without_row(RamRows& rows, std::int64_t key) {
  const std::int32_t valid = checked(rows.residency(), key);
  if (rows.residency().slot(valid) >= 0) value_error("key: " + std::to_string(key) + " has a row already");
  return valid;
}

Keys weakest(RamRows& rows, std::size_t n, const Keys& busy) {
  for (const std::int32_t key : busy) checked(rows.residency(), key);
  return rows.weakest(n, busy);
}

void make_room(RamRows& rows, std::size_t n_free, const Keys& busy) {
  for (const std::int32_t key : busy) checked(rows.residency(), key);
  rows.make_room(n_free, busy);
}

}  // namespace

void register_ram_rows(nb::module_& m) {
  nb::class_<RamRows>(m, "RamRows")
      .def(
          "__init__",
          [](RamRows* self, const Table& table, std::size_t n_rows, std::size_t reserve, double half_life,
             std::size_t n_experts) {
            new (self) RamRows({table.data(), table.size()}, n_rows, reserve, half_life, n_experts);
          },
          "table"_a.noconvert(), "n_rows"_a, "reserve"_a, "half_life"_a, "n_experts"_a,
          nb::keep_alive<1, 2>())
      .def_prop_ro("residency", &RamRows::residency, nb::rv_policy::reference_internal)
      .def("take_over", &RamRows::take_over)
      .def(
          "place", [](RamRows& r, std::int64_t key) { return r.place(without_row(r, key)); }, "key"_a)
      .def(
          "arrived", [](RamRows& r, std::int64_t key) { r.arrived(with_row(r, key)); }, "key"_a)
      .def(
          "drop", [](RamRows& r, std::int64_t key) { r.drop(with_row(r, key)); }, "key"_a)
      .def(
          "hand_over",
          [](RamRows& r, std::int64_t from, std::int64_t to) {
            const std::int32_t receiver = without_row(r, to);
            r.hand_over(with_row(r, from), receiver);
          },
          "from_key"_a, "to_key"_a)
      .def("weakest", weakest, "n"_a, "busy"_a = Keys())
      .def("make_room", make_room, "n_free"_a, "busy"_a = Keys());
}

}  // namespace moebox
