// The engine for many tokens in fp32. It dequantizes a panel of rows into the cache and multiplies it with
// all tokens.
//
// A vector holds one k of kLanes rows and is multiplied with one activation in all lanes (an outer product),
// so sums over k need no shuffles. Packed words are transposed before they are unpacked: an eighth of the
// work.
#pragma once

#include "experts/math_isa.h"

namespace moebox::MOEBOX_ISA {
namespace {

#if MOEBOX_ISA_AVX512

struct Fp32 {
  using Vec = __m512;
  using Words = __m512i;
  static constexpr std::size_t kLanes = 16, kTokens = 12;

  static Vec load(const float* at) { return _mm512_load_ps(at); }
  static Vec load_unaligned(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, Vec v) { _mm512_storeu_ps(at, v); }
  static Vec all(float value) { return _mm512_set1_ps(value); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec madd(Vec a, Vec b, Vec acc) { return _mm512_fmadd_ps(a, b, acc); }

  // Lane r of words[w] becomes word w of row r's group. Rows r, 4 + r, 8 + r, 12 + r go to one vector's four
  // lanes of 128 bits; transposing the four vectors' double words within lanes then sorts them.
  static void transpose(const std::uint8_t* packed, std::size_t row_bytes, Words* words) {
    Words rows[4];
    for (std::size_t r = 0; r < 4; ++r) {
      const auto at = [&](std::size_t i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + (4 * i + r) * row_bytes));
      };
      rows[r] = _mm512_broadcast_i32x4(at(0));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x00f0, at(1));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x0f00, at(2));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0xf000, at(3));
    }
    const Words a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const Words c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    words[0] = _mm512_unpacklo_epi64(a, c);
    words[1] = _mm512_unpackhi_epi64(a, c);
    words[2] = _mm512_unpacklo_epi64(b, d);
    words[3] = _mm512_unpackhi_epi64(b, d);
  }

  // Exact: a 4-bit integer times an 8-bit significand. vpermps reads only the low four bits of an index.
  static Vec dequantize(Words words, unsigned nibble, Vec scale) {
    const Words index = _mm512_srli_epi32(words, 4 * nibble);
    return _mm512_mul_ps(_mm512_permutexvar_ps(index, int4_values()), scale);
  }
};

#elif MOEBOX_ISA_AVX2

struct Fp32 {
  using Vec = __m256;
  using Words = __m256i;
  static constexpr std::size_t kLanes = 8, kTokens = 6;

  static Vec load(const float* at) { return _mm256_load_ps(at); }
  static Vec load_unaligned(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, Vec v) { _mm256_storeu_ps(at, v); }
  static Vec all(float value) { return _mm256_set1_ps(value); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec madd(Vec a, Vec b, Vec acc) { return _mm256_fmadd_ps(a, b, acc); }

  // As with AVX-512, but a vector has two lanes.
  static void transpose(const std::uint8_t* packed, std::size_t row_bytes, Words* words) {
    Words rows[4];
    for (std::size_t r = 0; r < 4; ++r)
      rows[r] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(packed + (4 + r) * row_bytes),
                                    reinterpret_cast<const __m128i*>(packed + r * row_bytes));
    const Words a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const Words c = _mm256_unpacklo_epi32(rows[2], rows[3]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
    words[0] = _mm256_unpacklo_epi64(a, c);
    words[1] = _mm256_unpackhi_epi64(a, c);
    words[2] = _mm256_unpacklo_epi64(b, d);
    words[3] = _mm256_unpackhi_epi64(b, d);
  }

  static Vec dequantize(Words words, unsigned nibble, Vec scale) {
    const Words u = _mm256_and_si256(_mm256_srli_epi32(words, 4 * nibble), _mm256_set1_epi32(15));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(u, _mm256_set1_epi32(8))), scale);
  }
};

#else

struct Fp32 {
  using Vec = float;
  using Words = std::uint32_t;
  static constexpr std::size_t kLanes = 1, kTokens = 4;

  static Vec load(const float* at) { return *at; }
  static Vec load_unaligned(const float* at) { return *at; }
  static void store(float* at, Vec v) { *at = v; }
  static Vec all(float value) { return value; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec madd(Vec a, Vec b, Vec acc) { return acc + a * b; }

  // Reads bytes, so that the machine's byte order does not matter.
  static void transpose(const std::uint8_t* packed, std::size_t, Words* words) {
    for (std::size_t w = 0; w < 4; ++w, packed += 4)
      words[w] = packed[0] | packed[1] << 8 | packed[2] << 16 | static_cast<Words>(packed[3]) << 24;
  }

  static Vec dequantize(Words words, unsigned nibble, Vec scale) {
    return static_cast<float>(static_cast<int>(words >> 4 * nibble & 15) - 8) * scale;
  }
};

#endif

struct Fp32Panel {
  using Vec = Fp32::Vec;
  static constexpr std::size_t kLanes = Fp32::kLanes;
  static constexpr std::size_t kVecs = 2;               // vectors of rows in a panel and a register tile
  static constexpr std::size_t kRows = kVecs * kLanes;  // divides kRowBlock
  static constexpr std::size_t kPanelGroups = 16;  // a panel is 64 KiB: it stays in the second-level cache
  // A token is one cache line longer than a power of two: else tokens would fall into the same cache sets.
  static constexpr std::size_t kPad = 16;

  static std::size_t stride(std::size_t groups) { return groups * kGroup + kPad; }
  static std::size_t operand_bytes(std::size_t groups) { return stride(groups) * sizeof(float); }
  static std::size_t scratch_bytes(std::size_t) { return kPanelGroups * kGroup * kRows * sizeof(float); }

  static void prepare(const Rows& rows, std::size_t groups, std::byte* operand) {
    auto* out = reinterpret_cast<float*>(operand);
    for (std::size_t g = 0; g < groups; ++g) load_group(rows.row[0], g, rows.bf16, out + g * kGroup);
  }

  // The panel is [k][kRows]. Its rows come from kRows places of memory. Prefetches the next panel's rows.
  static void dequantize(const Matrix& m, std::size_t row, std::size_t group, std::size_t n, float* panel) {
    for (std::size_t v = 0; v < kVecs; ++v) {
      const std::size_t at = (row + v * kLanes) * m.stride + group;
      alignas(64) float scale[kPanelGroups][kLanes];
      for (std::size_t r = 0; r < kLanes; ++r) {
        alignas(64) float of_row[kPanelGroups];
        prefetch_groups(m, row + v * kLanes + r + kRows, group, n);
        load_scales(m.scale + at + r * m.stride, n, of_row);
        for (std::size_t g = 0; g < n; ++g) scale[g][r] = of_row[g];
      }
      for (std::size_t g = 0; g < n; ++g)
        unpack(m.packed + (at + g) * kGroupBytes, m.stride * kGroupBytes, Fp32::load(scale[g]),
               panel + g * kGroup * kRows + v * kLanes);
    }
  }

  static void unpack(const std::uint8_t* packed, std::size_t row_bytes, Vec scale, float* out) {
    Fp32::Words words[4];
    Fp32::transpose(packed, row_bytes, words);
#pragma GCC unroll 4
    for (std::size_t w = 0; w < 4; ++w)
#pragma GCC unroll 8
      for (unsigned nibble = 0; nibble < 8; ++nibble)
        Fp32::store(out + (8 * w + nibble) * kRows, Fp32::dequantize(words[w], nibble, scale));
  }

  // c[t][0..kRows) = (or += with `add`) a panel times N tokens over k elements.
  template <std::size_t N>
  static void tile(const float* panel, const float* x, std::size_t x_stride, std::size_t k, float* c,
                   std::size_t ldc, bool add) {
    Vec acc[kVecs][N];
#pragma GCC unroll 16
    for (std::size_t t = 0; t < N; ++t) acc[0][t] = acc[1][t] = Fp32::all(0);
    for (std::size_t i = 0; i < k; ++i) {
      const Vec a = Fp32::load(panel + i * kRows), b = Fp32::load(panel + i * kRows + kLanes);
#pragma GCC unroll 16
      for (std::size_t t = 0; t < N; ++t) {
        const Vec token = Fp32::all(x[t * x_stride + i]);
        acc[0][t] = Fp32::madd(a, token, acc[0][t]);
        acc[1][t] = Fp32::madd(b, token, acc[1][t]);
      }
    }
#pragma GCC unroll 16
    for (std::size_t t = 0; t < N; ++t)
      for (std::size_t v = 0; v < kVecs; ++v) {
        float* out = c + t * ldc + v * kLanes;
        Fp32::store(out, add ? Fp32::add(Fp32::load_unaligned(out), acc[v][t]) : acc[v][t]);
      }
  }

  // One tile of n tokens, n <= N.
  template <std::size_t N = Fp32::kTokens>
  static void narrow_tile(std::size_t n, const float* panel, const float* x, std::size_t x_stride,
                          std::size_t k, float* c, std::size_t ldc, bool add) {
    if constexpr (N > 1)
      if (n < N) return narrow_tile<N - 1>(n, panel, x, x_stride, k, c, ldc, add);
    tile<N>(panel, x, x_stride, k, c, ldc, add);
  }

  // Takes all tokens in tiles of about the same width: a narrow tile would wait for its multiply-adds.
  static void tokens(const float* panel, const float* x, std::size_t x_stride, std::size_t n, std::size_t k,
                     float* c, std::size_t ldc, bool add) {
    for (std::size_t tiles = (n + Fp32::kTokens - 1) / Fp32::kTokens; tiles > 0; --tiles) {
      const std::size_t width = n / tiles;
      narrow_tile(width, panel, x, x_stride, k, c, ldc, add);
      n -= width;
      x += width * x_stride;
      c += width * ldc;
    }
  }

  static void multiply(const Matrix& m, std::size_t first, std::size_t n_rows, const std::byte* operands,
                       std::size_t n, float* c, std::size_t ldc, std::byte* scratch) {
    const auto* x = reinterpret_cast<const float*>(operands);
    auto* panel = reinterpret_cast<float*>(scratch);
    for (std::size_t group = 0; group < m.groups; group += kPanelGroups) {
      const std::size_t width = m.groups - group < kPanelGroups ? m.groups - group : kPanelGroups;
      for (std::size_t r = 0; r < n_rows; r += kRows) {
        dequantize(m, first + r, group, width, panel);
        tokens(panel, x + group * kGroup, stride(m.groups), n, width * kGroup, c + r, ldc, group > 0);
      }
    }
  }

  static constexpr Engine engine() { return {1, operand_bytes, scratch_bytes, prepare, multiply}; }
};

}  // namespace
}  // namespace moebox::MOEBOX_ISA
