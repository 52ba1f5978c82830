// INT4 expert MLPs: out[t] += w * down(silu(gate x) * up x), straight from the checkpoint's bytes.
//
// Shapes: T tokens, H hidden_size, I moe_intermediate_size; K a matrix's input width, N tokens of one call.
// A matrix is packed int32 [out, K/8], low nibble first, u = q + 8, and bf16 scales [out, K/32].
//
// Nothing is repacked: the activations are regrouped instead, once per call (an engine's "operand"), to the
// order in which shifting whole vectors of packed words yields nibbles, namely nibble j of each word for each
// j. Addresses need no alignment, and any K that is a multiple of 32 will do.
//
// - row_isa.h (with int16_isa.h): few tokens; reading the weights is the limit, each row is used as it
// arrives.
// - fp32_panel_isa.h: many tokens, and fp32 hidden states; rows are dequantized into the cache first.
// - bf16_panel_isa.h: the same with AVX-512 BF16.
// - tile_isa.h: the same with AMX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "isa.h"
#include "pool.h"

namespace moebox {

constexpr std::size_t kGroup = 32;       // weights per scale
constexpr std::size_t kGroupBytes = 16;  // packed bytes per group
constexpr std::size_t kRowBlock = 32;    // rows are handed to kernels in multiples of this
// Packed bytes times tokens, some 50 us of work: below it waking the other threads costs more than it saves,
// and far more where they have to wait for a core.
constexpr std::size_t kShareFromBytes = 512 << 10;

struct Matrix {
  const std::uint8_t* packed;  // [rows, groups, 16]
  const std::uint16_t* scale;  // bf16 [rows, groups]
  std::size_t rows, groups;
  std::size_t stride = groups;  // groups from one row to the next: more where it is a part of the columns
};

// N rows of activations, fp32 or bf16, anywhere in memory.
struct Rows {
  const void* const* row;
  std::size_t n;
  bool bf16;
};

// One way to multiply: the activations are first turned into operands of `bundle` tokens each, `n` of which
// lie one after another.
struct Engine {
  std::size_t bundle;
  std::size_t (*operand_bytes)(std::size_t groups);
  std::size_t (*scratch_bytes)(std::size_t groups);
  // rows.n <= bundle; the operand is aligned to 64 bytes.
  void (*prepare)(const Rows& rows, std::size_t groups, std::byte* operand);
  // c[t * ldc + r] = dot(matrix row first + r, token t), fp32 [n, ldc], for r < rows.
  void (*multiply)(const Matrix& matrix, std::size_t first, std::size_t rows, const std::byte* operands,
                   std::size_t n, float* c, std::size_t ldc, std::byte* scratch);
  // Engines of one token a bundle only, whose multiply takes any number of rows and no scratch: a part of
  // prepare(), `n` groups from `first` on, into an operand of zeros.
  void (*prepare_groups)(const void* row, bool bf16, std::size_t first, std::size_t n, std::size_t groups,
                         std::byte* operand) = nullptr;
};

struct ExpertKernels {
  Engine exact;      // fp32 activations, fp32 products
  Engine few, many;  // for bf16 hidden states: up to few_tokens tokens an expert, and more
  std::size_t few_tokens;
  // h[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(const float* gate, const float* up, float* h, std::size_t n);
};

MOEBOX_DECLARE_TABLES(ExpertKernels, kExpertKernels)

struct ExpertWeights {
  Matrix gate, up, down;  // [I, H], [I, H], [H, I]
};

// CSR: expert e gets pairs offsets[e] .. offsets[e + 1]; pair p adds weights[p] * expert(hidden[tokens[p]])
// to out[tokens[p]].
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

// Adds in the order of the pairs, whatever the number of threads: the same bits each time.
// The calling thread calls `first`, if there is one, when the others have begun.
void experts_forward(ThreadPool::Lease& pool, const ExpertsCall& call, const ExpertKernels& kernels,
                     std::function<void()> first = {});

}  // namespace moebox
