// INT4 expert MLPs on the CPU: out[t] += w * down(silu(gate x) * up x), computed from the checkpoint's bytes.
//
// Shapes: T tokens, H hidden_size, I moe_intermediate_size; K a matrix's input width, N tokens of one call.
// A matrix is packed int32 [out, K/8], low nibble first, u = q + 8, and bf16 scales [out, K/32].
//
// The weights are not repacked. Shifting whole vectors of packed words yields nibble j of each word, for each
// j, so the activations are brought into that order instead, once per call: they become an engine's
// "operand". Addresses need no alignment, and K may be any multiple of 32.
//
// - row_isa.h (with int16_isa.h): for few tokens. Reading the weights is the limit; each row is used as it
//   arrives.
// - fp32_panel_isa.h: for many tokens, and for fp32 hidden states. Rows are dequantized into the cache first.
// - bf16_panel_isa.h: the same with AVX-512 BF16.
// - tile_isa.h: the same with AMX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "int4.h"
#include "isa.h"
#include "pool.h"

namespace moebox {

constexpr std::size_t kRowBlock = 32;  // kernels get rows in multiples of this
// Packed bytes times tokens, about 50 us of work. Below it, waking the other threads costs more than they
// save, and far more where they have to wait for a core.
constexpr std::size_t kShareFromBytes = 512 << 10;
// Pairs of expert and token that experts_forward computes at a time. It bounds the scratch memory: about 45
// KB a pair at K2's shape in fp32.
constexpr std::size_t kBatchPairs = 2048;

struct Matrix {
  const std::uint8_t* packed;  // [rows, groups, 16]
  const std::uint16_t* scale;  // bf16 [rows, groups]
  std::size_t rows, groups;
  std::size_t stride = groups;  // groups from one row to the next; more in a matrix of some columns only
};

// N rows of activations, fp32 or bf16, anywhere in memory.
struct Rows {
  const void* const* row;
  std::size_t n;
  bool bf16;
};

// One way to multiply a matrix with tokens. prepare() first turns activations into operands of `bundle`
// tokens each, which stand one after another in memory.
struct Engine {
  std::size_t bundle;
  std::size_t (*operand_bytes)(std::size_t groups);
  std::size_t (*scratch_bytes)(std::size_t groups);
  // rows.n <= bundle; the operand must be aligned to 64 bytes.
  void (*prepare)(const Rows& rows, std::size_t groups, std::byte* operand);
  // c[t * ldc + r] = dot(matrix row first + r, token t), fp32 [n, ldc], for r < rows.
  void (*multiply)(const Matrix& matrix, std::size_t first, std::size_t rows, const std::byte* operands,
                   std::size_t n, float* c, std::size_t ldc, std::byte* scratch);
  // Null except in engines of one token a bundle whose multiply() takes any number of rows and no scratch.
  // Does prepare() for `n` groups from `first` on, in an operand that holds zeros.
  void (*prepare_groups)(const void* row, bool bf16, std::size_t first, std::size_t n, std::size_t groups,
                         std::byte* operand) = nullptr;
};

struct ExpertKernels {
  Engine exact;      // fp32 activations, fp32 products
  Engine few, many;  // bf16 hidden states: for up to few_tokens tokens an expert, and for more
  std::size_t few_tokens;
  // h[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(const float* gate, const float* up, float* h, std::size_t n);
};

MOEBOX_DECLARE_TABLES(ExpertKernels, kExpertKernels)

struct ExpertWeights {
  Matrix gate, up, down;  // [I, H], [I, H], [H, I]
};

// Pairs of expert and token, as a sparse matrix in CSR form. Expert e has the pairs offsets[e] to
// offsets[e + 1]; pair p adds weights[p] * expert(hidden[tokens[p]]) to out[tokens[p]].
struct ExpertsCall {
  const ExpertWeights* const* experts;
  std::size_t n_experts;
  const std::int32_t* offsets;
  const std::int32_t* tokens;
  const float* weights;
  const void* hidden;  // [T, H], bf16 or fp32
  bool hidden_bf16;
  float* out;  // [T, H]
};

// Adds in the order of the pairs, so the result has the same bits for any number of threads. `on_start`: see
// ThreadPool::Lease::run().
void experts_forward(ThreadPool::Lease& pool, const ExpertsCall& call, const ExpertKernels& kernels,
                     std::function<void()> on_start = {});

}  // namespace moebox
