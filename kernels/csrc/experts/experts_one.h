// The experts of one token, for decoding. Shapes and layout: see experts.h.
#pragma once

#include <functional>

#include "experts/experts.h"
#include "pool.h"

namespace moebox {

struct OneTokenCall {
  const ExpertWeights* experts;  // of the same H; I may differ where takes_split_experts()
  std::size_t n;
  const float* weights;  // [n]
  const void* hidden;    // bf16 [H]
  float* out;            // [H], overwritten; n > 0
};

// Gives the same bits as experts_forward into zeros. It takes one round of the pool, so no worker waits for
// all others between an expert's two steps. `on_start`: see ThreadPool::Lease::run().
void experts_one(ThreadPool::Lease& pool, const OneTokenCall& call, const ExpertKernels& kernels,
                 const std::function<void()>& on_start = {});

// Whether a call may hold split experts, of which only some inner rows are computed: these rows of gate and
// up, and the same columns of down.
inline bool takes_split_experts(const ExpertKernels& kernels) {
  return kernels.few.prepare_groups != nullptr;
}

}  // namespace moebox
