// One token's experts, for decoding: see experts.h for shapes and layout.
#pragma once

#include <functional>

#include "experts/experts.h"
#include "pool.h"

namespace moebox {

struct OneCall {
  const ExpertWeights* experts;  // of the same H; I may differ where takes_parts()
  std::size_t n;
  const float* weights;  // [n]
  const void* hidden;    // bf16 [H]
  float* out;            // [H], overwritten; n > 0
};

// The same bits as experts_forward into zeros, in one round of the pool: no worker waits for all the others
// between an expert's two steps. The calling thread calls `first`, if there is one, when the others have
// begun.
void experts_one(ThreadPool::Lease& pool, const OneCall& call, const ExpertKernels& kernels,
                 const std::function<void()>& first = {});

// Whether an expert may be a part of one: some rows of gate and up, and those columns of down.
inline bool takes_parts(const ExpertKernels& kernels) { return kernels.few.prepare_groups != nullptr; }

}  // namespace moebox
