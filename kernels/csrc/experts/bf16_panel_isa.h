// The engine for many tokens in bf16, without AMX. It dequantizes a panel of rows into the cache and
// multiplies it with all tokens, by dot products of 32 elements.
#pragma once

#include "experts/bf16_isa.h"

#if MOEBOX_ISA_AVX512BF16

namespace moebox::MOEBOX_ISA {
namespace {

// The sum of each of four vectors, as one vector.
inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 lanes =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

struct Bf16Panel {
  using Elem = Bf16::Elem;
  static constexpr std::size_t kRows = 4;                         // of one register tile
  static constexpr std::size_t kK = Bf16::kPanelGroups * kGroup;  // a panel's width
  // A row is one cache line longer than a power of two: else rows and tokens would fall into the same cache
  // sets.
  static constexpr std::size_t kPad = 64 / sizeof(Elem);
  static constexpr std::size_t kPanelStride = kK + kPad;

  static std::size_t stride(std::size_t groups) { return groups * kGroup + kPad; }
  static std::size_t operand_bytes(std::size_t groups) { return stride(groups) * sizeof(Elem); }
  static std::size_t scratch_bytes(std::size_t) { return kRowBlock * kPanelStride * sizeof(Elem); }

  static void prepare(const Rows& rows, std::size_t groups, std::byte* operand) {
    auto* out = reinterpret_cast<Elem*>(operand);
    for (std::size_t g = 0; g < groups; ++g) Bf16::prepare(rows.row[0], g, rows.bf16, out + g * kGroup);
  }

  // A panel's rows come from kRowBlock places of memory. Prefetches the next panel's rows.
  static void dequantize(const Matrix& m, std::size_t row, std::size_t group, std::size_t n, Elem* panel) {
    for (std::size_t r = 0; r < kRowBlock; ++r) {
      const std::size_t at = (row + r) * m.stride + group;
      alignas(64) float scale[Bf16::kPanelGroups];
      prefetch_groups(m, row + r + kRowBlock, group, n);
      load_scales(m.scale + at, n, scale);
      for (std::size_t g = 0; g < n; ++g)
        Bf16::dequantize(m.packed + (at + g) * kGroupBytes, scale[g], panel + r * kPanelStride + g * kGroup);
    }
  }

  // c[t][0..3] = (or += with `add`) four panel rows times N tokens over k elements.
  template <std::size_t N>
  static void tile(const Elem* panel, const Elem* x, std::size_t x_stride, std::size_t k, float* c,
                   std::size_t ldc, bool add) {
    Bf16::Acc acc[kRows][N];
    for (auto& row : acc)
      for (auto& a : row) a = Bf16::zero();
    for (std::size_t i = 0; i < k; i += Bf16::kStep) {
      Bf16::Data b[N];
#pragma GCC unroll 8
      for (std::size_t t = 0; t < N; ++t) b[t] = Bf16::load(x + t * x_stride + i);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kRows; ++r) {
        const Bf16::Data a = Bf16::load(panel + r * kPanelStride + i);
#pragma GCC unroll 8
        for (std::size_t t = 0; t < N; ++t) acc[r][t] = Bf16::madd(a, b[t], acc[r][t]);
      }
    }
    for (std::size_t t = 0; t < N; ++t)
      store(sum4(acc[0][t], acc[1][t], acc[2][t], acc[3][t]), c + t * ldc, add);
  }

  static void store(__m128 sums, float* out, bool add) {
    _mm_storeu_ps(out, add ? _mm_add_ps(_mm_loadu_ps(out), sums) : sums);
  }

  template <std::size_t N>
  static void rows(const Elem* panel, const Elem* x, std::size_t x_stride, std::size_t k, float* c,
                   std::size_t ldc, bool add) {
    for (std::size_t r = 0; r < kRowBlock; r += kRows)
      tile<N>(panel + r * kPanelStride, x, x_stride, k, c + r, ldc, add);
  }

  // Takes all tokens, kTokens at a time, and those left over with a narrower tile.
  template <std::size_t N = Bf16::kTokens>
  static void tokens(const Elem* panel, const Elem* x, std::size_t x_stride, std::size_t n, std::size_t k,
                     float* c, std::size_t ldc, bool add) {
    for (; n >= N; n -= N, x += N * x_stride, c += N * ldc) rows<N>(panel, x, x_stride, k, c, ldc, add);
    if constexpr (N > 1)
      if (n > 0) tokens<N - 1>(panel, x, x_stride, n, k, c, ldc, add);
  }

  static void multiply(const Matrix& m, std::size_t first, std::size_t n_rows, const std::byte* operands,
                       std::size_t n, float* c, std::size_t ldc, std::byte* scratch) {
    const auto* x = reinterpret_cast<const Elem*>(operands);
    auto* panel = reinterpret_cast<Elem*>(scratch);
    for (std::size_t group = 0; group < m.groups; group += Bf16::kPanelGroups) {
      const std::size_t width = m.groups - group < Bf16::kPanelGroups ? m.groups - group : Bf16::kPanelGroups;
      for (std::size_t r = 0; r < n_rows; r += kRowBlock) {
        dequantize(m, first + r, group, width, panel);
        tokens(panel, x + group * kGroup, stride(m.groups), n, width * kGroup, c + r, ldc, group > 0);
      }
    }
  }

  static constexpr Engine engine() { return {1, operand_bytes, scratch_bytes, prepare, multiply}; }
};

}  // namespace
}  // namespace moebox::MOEBOX_ISA

#endif
