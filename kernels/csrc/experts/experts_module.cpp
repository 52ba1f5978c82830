// Python bindings: ThreadPool, Expert, experts_forward, and the constants that Python must share.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <vector>

#include "arrays.h"
#include "experts/experts.h"
#include "module.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

// An expert's six arrays as they are in the checkpoint; keeps them alive.
class Expert {
 public:
  Expert(Array gate_packed, Array gate_scale, Array up_packed, Array up_scale, Array down_packed,
         Array down_scale)
      : arrays_{std::move(gate_packed), std::move(gate_scale),  std::move(up_packed),
                std::move(up_scale),    std::move(down_packed), std::move(down_scale)} {
    std::optional<std::size_t> H, I;
    check(arrays_[0], "gate_packed", {Type::int32}, {{"I", I}, {"H", H, 8}});
    check(arrays_[1], "gate_scale", {Type::bf16}, {{"I", I}, {"H", H, kGroup}});
    check(arrays_[2], "up_packed", {Type::int32}, {{"I", I}, {"H", H, 8}});
    check(arrays_[3], "up_scale", {Type::bf16}, {{"I", I}, {"H", H, kGroup}});
    check(arrays_[4], "down_packed", {Type::int32}, {{"H", H}, {"I", I, 8}});
    check(arrays_[5], "down_scale", {Type::bf16}, {{"H", H}, {"I", I, kGroup}});
    if (*H == 0 || *I == 0 || *H % kGroup != 0 || *I % kGroup != 0)
      value_error("gate_packed: [I=" + std::to_string(*I) + ", H=" + std::to_string(*H) +
                  "] given, multiples of " + std::to_string(kGroup) + " needed");
    weights_ = {matrix(0), matrix(2), matrix(4)};
  }

  const ExpertWeights& weights() const { return weights_; }
  std::size_t hidden_size() const { return weights_.down.rows; }
  std::size_t moe_intermediate_size() const { return weights_.gate.rows; }
  std::size_t nbytes() const {
    std::size_t total = 0;
    for (const Array& array : arrays_) total += array.nbytes();
    return total;
  }

 private:
  // The matrix whose packed values are array i and whose scales are array i + 1.
  Matrix matrix(std::size_t i) const {
    return {elements<std::uint8_t>(arrays_[i]), elements<std::uint16_t>(arrays_[i + 1]), arrays_[i].shape(0),
            arrays_[i + 1].shape(1)};
  }

  std::array<Array, 6> arrays_;
  ExpertWeights weights_;
};

std::vector<const ExpertWeights*> weights_of(const nb::tuple& experts, std::size_t H) {
  std::vector<const ExpertWeights*> weights;
  for (const nb::handle item : experts) {
    const Expert& expert = nb::cast<const Expert&>(item);
    const std::size_t I = weights.empty() ? expert.moe_intermediate_size() : weights.front()->gate.rows;
    const auto which = [&] { return "experts[" + std::to_string(weights.size()) + "]: "; };
    if (expert.hidden_size() != H)
      value_error(which() + "hidden_size " + std::to_string(expert.hidden_size()) +
                  " given, hidden's H=" + std::to_string(H) + " needed");
    if (expert.moe_intermediate_size() != I)
      value_error(which() + "moe_intermediate_size " + std::to_string(expert.moe_intermediate_size()) +
                  " given, experts[0]'s I=" + std::to_string(I) + " needed");
    weights.push_back(&expert.weights());
  }
  return weights;
}

[[noreturn]] void bad_element(const char* array, std::size_t i, std::int32_t given,
                              const std::string& needed) {
  const std::string what = std::string(array) + "[" + std::to_string(i) + "]: " + std::to_string(given);
  value_error(what + " given, " + needed + " needed");
}

void check_offsets(const std::int32_t* offsets, std::size_t n, std::size_t m) {
  if (offsets[0] != 0) bad_element("offsets", 0, offsets[0], "0");
  for (std::size_t i = 0; i < n; ++i)
    if (offsets[i + 1] < offsets[i])
      bad_element("offsets", i + 1, offsets[i + 1], "at least " + std::to_string(offsets[i]) + " before it");
  if (static_cast<std::size_t>(offsets[n]) != m)
    bad_element("offsets", n, offsets[n], "the length of tokens, " + std::to_string(m) + ",");
}

void check_tokens(const std::int32_t* tokens, std::size_t m, std::size_t T) {
  for (std::size_t i = 0; i < m; ++i)
    if (tokens[i] < 0 || static_cast<std::size_t>(tokens[i]) >= T)
      bad_element("tokens", i, tokens[i], "a row of hidden's T=" + std::to_string(T));
}

void forward(ThreadPool& pool, const nb::sequence& sequence, const Array& offsets, const Array& tokens,
             const Array& weights, const Array& hidden, nb::handle out_argument,
             const std::optional<std::string>& isa) {
  const OutArray out = writable(out_argument, "out");
  // A copy: the caller's list may change while the GIL is released.
  const nb::tuple experts(sequence);
  std::optional<std::size_t> T, H, m, n_plus_1 = experts.size() + 1;
  check(hidden, "hidden", {Type::bf16, Type::float32}, {{"T", T}, {"H", H}});
  check(Array(out), "out", {Type::float32}, {{"T", T}, {"H", H}});
  check(offsets, "offsets", {Type::int32}, {{"n+1", n_plus_1}});
  check(tokens, "tokens", {Type::int32}, {{"m", m}});
  check(weights, "weights", {Type::float32}, {{"m", m}});
  const auto* offset = elements<std::int32_t>(offsets);
  const auto* token = elements<std::int32_t>(tokens);
  check_offsets(offset, experts.size(), *m);
  check_tokens(token, *m, *T);
  const auto matrices = weights_of(experts, *H);
  const ExpertKernels& kernels = MOEBOX_TABLE(kExpertKernels, choose_isa(isa));
  const ExpertsCall call{matrices.data(),
                         matrices.size(),
                         offset,
                         token,
                         elements<float>(weights),
                         hidden.data(),
                         is_type(hidden.dtype(), Type::bf16),
                         elements<float>(out)};
  const nb::gil_scoped_release unlocked;
  ThreadPool::Lease lease(pool);
  experts_forward(lease, call, kernels);
}

}  // namespace

void register_experts(nb::module_& m) {
  m.attr("GROUP_SIZE") = kGroup;
  m.attr("BATCH_PAIRS") = kBatchPairs;
  m.def("allowed_cpus", [] { return allowed_cpus().size(); });

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<std::optional<int>, bool>(), "threads"_a = nb::none(), "pin"_a = true)
      .def_prop_ro("threads", &ThreadPool::size);

  nb::class_<Expert>(m, "Expert")
      .def(nb::init<Array, Array, Array, Array, Array, Array>(), "gate_packed"_a.noconvert(),
           "gate_scale"_a.noconvert(), "up_packed"_a.noconvert(), "up_scale"_a.noconvert(),
           "down_packed"_a.noconvert(), "down_scale"_a.noconvert())
      .def_prop_ro("hidden_size", &Expert::hidden_size)
      .def_prop_ro("moe_intermediate_size", &Expert::moe_intermediate_size)
      .def_prop_ro("nbytes", &Expert::nbytes);

  m.def("experts_forward", forward, "pool"_a, "experts"_a, "offsets"_a.noconvert(), "tokens"_a.noconvert(),
        "weights"_a.noconvert(), "hidden"_a.noconvert(), "out"_a, "isa"_a = nb::none());
}

}  // namespace moebox
