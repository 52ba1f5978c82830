// Replays of routing traces for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <utility>

#include "arrays.h"
#include "module.h"
#include "residency/replay.h"
#include "to_numpy.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

nb::ndarray<nb::numpy, std::int32_t> replay_hits(const Array& ids, std::size_t n_experts, std::size_t slots,
                                                 Policy policy, double half_life) {
  std::optional<std::size_t> tokens, layers, top_k;
  check(ids, "ids", {Type::int32}, {{"T", tokens}, {"L", layers}, {"k", top_k}});
  const auto* data = elements<std::int32_t>(ids);
  const std::size_t n = *tokens * *layers * *top_k;
  for (std::size_t i = 0; i < n; ++i)
    if (data[i] < 0 || static_cast<std::size_t>(data[i]) >= n_experts)
      value_error("ids: expert " + std::to_string(data[i]) +
                  " given, 0 to n_experts=" + std::to_string(n_experts) + " - 1 needed");
  std::vector<std::int32_t> hits;
  {
    const nb::gil_scoped_release unlocked;
    hits = replay({data, *tokens, *layers, *top_k, n_experts}, slots, policy, half_life);
  }
  return to_numpy(std::move(hits), *tokens);
}

}  // namespace

void register_replay(nb::module_& m) {
  nb::enum_<Policy>(m, "Policy")
      .value("decayed", Policy::decayed)
      .value("score", Policy::score)
      .value("lru", Policy::lru)
      .value("lfu", Policy::lfu)
      .value("belady", Policy::belady);
  m.def("replay_hits", &replay_hits, "ids"_a.noconvert(), "n_experts"_a, "slots"_a, "policy"_a,
        "half_life"_a);
}

}  // namespace moebox
