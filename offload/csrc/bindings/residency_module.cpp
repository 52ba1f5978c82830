// Residency for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "module.h"
#include "residency/residency.h"
#include "residency_binding.h"
#include "to_numpy.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

// Checks all keys and values, then calls visit(key, value) for each pair; the value is 1 without `values`.
template <class Visit>
void for_keys(const Residency& residency, const Array& keys, const std::optional<Array>& values,
              const char* name, Visit&& visit) {
  std::optional<std::size_t> n;
  check(keys, "keys", {Type::int32}, {{"n", n}});
  if (values) check(*values, name, {Type::float32}, {{"n", n}});
  const auto* key = elements<std::int32_t>(keys);
  const auto* value = values ? elements<float>(*values) : nullptr;
  for (std::size_t i = 0; i < *n; ++i) {
    checked(residency, key[i]);
    if (value && !(value[i] >= 0 && std::isfinite(value[i])))
      value_error(std::string(name) + "[" + std::to_string(i) + "]: " + std::to_string(value[i]) +
                  " given, a number of at least 0 needed");
  }
  for (std::size_t i = 0; i < *n; ++i) visit(key[i], value ? value[i] : 1.0f);
}

void update_values(Residency& residency, const Array& keys) {
  std::vector<std::int32_t> picks;
  for_keys(residency, keys, std::nullopt, "", [&picks](std::int32_t key, float) { picks.push_back(key); });
  const std::size_t n_experts = residency.n_experts();
  for (const std::int32_t key : picks)
    if (key / n_experts != picks[0] / n_experts)
      value_error("keys: " + std::to_string(picks[0]) + " and " + std::to_string(key) +
                  " given, keys of one layer needed");
  residency.update_values(picks);
}

nb::ndarray<nb::numpy, float> scores(const Residency& residency) {
  std::vector<float> scores(residency.n_keys());
  for (std::size_t key = 0; key < scores.size(); ++key)
    scores[key] = static_cast<float>(residency.score(static_cast<std::int32_t>(key)));
  return to_numpy(std::move(scores), residency.n_keys());
}

std::int32_t place(Residency& residency, std::int64_t key) {
  const std::int32_t valid = checked(residency, key);
  if (residency.slot(valid) >= 0) value_error("key: " + std::to_string(key) + " is resident already");
  return residency.place(valid);
}

void release(Residency& residency, std::int64_t key) {
  const std::int32_t valid = checked(residency, key);
  if (residency.slot(valid) < 0) value_error("key: " + std::to_string(key) + " is not resident");
  residency.release(valid);
}

}  // namespace

void register_residency(nb::module_& m) {
  m.attr("SCORE_HALF_LIFE_TOKENS") = kScoreHalfLifeTokens;
  nb::class_<Residency>(m, "Residency")
      .def(nb::init<std::size_t, std::size_t, std::size_t, double, std::size_t>(), "n_keys"_a, "n_slots"_a,
           "reserve"_a, "half_life"_a = kScoreHalfLifeTokens, "n_experts"_a = 0)
      .def_prop_rw("tick", &Residency::tick, &Residency::set_tick)
      .def_prop_ro("n_keys", &Residency::n_keys)
      .def_prop_ro("n_slots", &Residency::n_slots)
      .def_prop_ro("reserve", &Residency::reserve)
      .def_prop_ro("n_free", &Residency::n_free)
      .def_prop_ro("n_resident", &Residency::n_resident)
      .def("slots", [](const Residency& r) { return to_numpy(r.slots(), r.n_slots()); })
      .def("table", [](const Residency& r) { return to_numpy(r.table(), r.n_keys()); })
      .def(
          "slot", [](const Residency& r, std::int64_t key) { return r.slot(checked(r, key)); }, "key"_a)
      .def(
          "use",
          [](Residency& r, const Array& keys, const std::optional<Array>& counts) {
            for_keys(r, keys, counts, "counts", [&r](std::int32_t key, float n) { r.use(key, n); });
          },
          "keys"_a.noconvert(), "counts"_a.noconvert() = nb::none())
      .def("update_values", update_values, "keys"_a.noconvert())
      .def(
          "score", [](const Residency& r, std::int64_t key) { return r.score(checked(r, key)); }, "key"_a)
      .def("scores", scores)
      .def(
          "seed",
          [](Residency& r, const Array& keys, const Array& scores) {
            for_keys(r, keys, scores, "scores", [&r](std::int32_t key, float score) { r.seed(key, score); });
          },
          "keys"_a.noconvert(), "scores"_a.noconvert())
      .def("place", place, "key"_a)
      .def("release", release, "key"_a)
      .def("weakest", &Residency::weakest, "n"_a)
      .def("trim", &Residency::trim);
}

}  // namespace moebox
