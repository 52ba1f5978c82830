// The engine for few tokens. Reading the weights is its limit, so it reads each row once, in order, and uses
// it as it arrives.
#pragma once

#include "experts/math_isa.h"

namespace moebox::MOEBOX_ISA {
namespace {

template <class Math>
struct RowByRow {
  static constexpr std::size_t kBlock = 256;         // groups whose scales are computed at a time
  static constexpr std::size_t kAhead = 4096;        // packed weights are prefetched so many bytes ahead
  static constexpr std::size_t kScalesAhead = 1024;  // and scales so many bytes

  // One row times N tokens. Several sums per token hide the latency of the multiply-add.
  template <std::size_t N>
  static void row(const std::uint8_t* packed, const std::uint16_t* scale, std::size_t groups,
                  const typename Math::Operand* x, float* c, std::size_t ldc) {
    constexpr std::size_t kSums = N == 1 ? 4 : N < 4 ? 2 : 1, kStep = 4 * Math::kChunk;
    typename Math::Acc acc[N][kSums];
#pragma GCC unroll 8
    for (auto& token : acc)
#pragma GCC unroll 4
      for (auto& a : token) a = Math::zero();
    for (std::size_t g0 = 0; g0 < groups; g0 += kBlock) {
      const std::size_t n = groups - g0 < kBlock ? groups - g0 : kBlock;
      alignas(64) float s[N][kBlock];
      for (std::size_t i = 0; i < n; i += 32)
        prefetch(reinterpret_cast<const std::uint8_t*>(scale + g0 + i) + kScalesAhead);
#pragma GCC unroll 8
      for (std::size_t t = 0; t < N; ++t) acc[t][0] = acc[t][0] + Math::scales(scale + g0, x[t], g0, n, s[t]);
      const auto add = [&](std::size_t g, const auto& nibbles,
                           std::size_t which) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (std::size_t t = 0; t < N; ++t)
          acc[t][which % kSums] =
              Math::madd(nibbles, x[t].x + (g0 + g) * kGroup, s[t] + g, acc[t][which % kSums]);
      };
      std::size_t g = 0;
      for (; g + kStep <= n; g += kStep) {
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kStep; i += Math::kChunk) {
          const std::size_t at = g + i;
          if (at % 4 == 0) prefetch(packed + (g0 + at) * kGroupBytes + kAhead);
          add(at, Math::spread(packed + (g0 + at) * kGroupBytes), i / Math::kChunk);
        }
      }
      for (; g + Math::kChunk <= n; g += Math::kChunk)
        add(g, Math::spread(packed + (g0 + g) * kGroupBytes), 0);
      if (g < n) add(g, Math::spread_some(packed + (g0 + g) * kGroupBytes, n - g), 1);
    }
#pragma GCC unroll 8
    for (std::size_t t = 0; t < N; ++t) {
      typename Math::Acc total = acc[t][0];
#pragma GCC unroll 4
      for (std::size_t i = 1; i < kSums; ++i) total = total + acc[t][i];
      c[t * ldc] = sum(total);
    }
  }

  template <std::size_t N>
  static void rows(const Matrix& m, std::size_t first, std::size_t n_rows, const std::byte* operands,
                   float* c, std::size_t ldc) {
    typename Math::Operand x[N];
    for (std::size_t t = 0; t < N; ++t) x[t] = Math::operand(operands + t * Math::bytes(m.groups), m.groups);
    for (std::size_t r = 0; r < n_rows; ++r) {
      const std::size_t at = (first + r) * m.stride;
      row<N>(m.packed + at * kGroupBytes, m.scale + at, m.groups, x, c + r, ldc);
    }
  }

  static constexpr std::size_t kTokens = 4;

  static void multiply(const Matrix& m, std::size_t first, std::size_t n_rows, const std::byte* operands,
                       std::size_t n, float* c, std::size_t ldc, std::byte*) {
    for (; n > 0; operands += kTokens * Math::bytes(m.groups), c += kTokens * ldc) {
      if (n == 1) rows<1>(m, first, n_rows, operands, c, ldc);
      if (n == 2) rows<2>(m, first, n_rows, operands, c, ldc);
      if (n == 3) rows<3>(m, first, n_rows, operands, c, ldc);
      if (n >= 4) rows<4>(m, first, n_rows, operands, c, ldc);
      n -= n < kTokens ? n : kTokens;
    }
  }

  static std::size_t scratch_bytes(std::size_t) { return 0; }

  static void prepare(const Rows& rows, std::size_t groups, std::byte* operand) {
    std::memset(operand, 0, Math::bytes(groups));
    prepare_groups(rows.row[0], rows.bf16, 0, groups, groups, operand);
  }

  static void prepare_groups(const void* row, bool bf16, std::size_t first, std::size_t n, std::size_t groups,
                             std::byte* operand) {
    for (std::size_t g = first; g < first + n; ++g) {
      float values[kGroup];
      load_group(row, g, bf16, values);
      Math::prepare(values, g, groups, operand);
    }
  }

  static constexpr Engine engine() {
    return {1, Math::bytes, scratch_bytes, prepare, multiply, prepare_groups};
  }
};

}  // namespace
}  // namespace moebox::MOEBOX_ISA
