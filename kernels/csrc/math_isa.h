// The arithmetic of each instruction set. Included by *_isa.cpp only.
//
// A "panel math" turns a group of 32 weights into elements that later meet several tokens; a "row math"
// uses the nibbles at once, for few tokens. Everything is in an anonymous namespace of the set's own
// namespace: an inline function shared between sets could be linked in its AVX-512 form on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "experts.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moebox::MOEBOX_ISA {
namespace {

inline float bf16_to_float(std::uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
}

// Round to nearest even; NaN stays NaN.
inline std::uint16_t float_to_bf16(float value) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void load_group(const void* row, std::size_t group, bool bf16, float* out) {
  if (bf16) {
    const auto* from = static_cast<const std::uint8_t*>(row) + group * kGroup * 2;
    std::uint16_t bits[kGroup];
    std::memcpy(bits, from, sizeof bits);
    for (std::size_t i = 0; i < kGroup; ++i) out[i] = bf16_to_float(bits[i]);
  } else {
    std::memcpy(out, static_cast<const std::uint8_t*>(row) + group * kGroup * 4, kGroup * 4);
  }
}

// fp32 elements lie in the order "nibble j of words 0..3, for j = 0..7".
inline void prepare_fp32(const void* row, std::size_t group, bool bf16, float* out) {
  float values[kGroup];
  load_group(row, group, bf16, values);
  for (std::size_t i = 0; i < kGroup; ++i) out[i % 8 * 4 + i / 8] = values[i];
}

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// One row's share of a panel: `groups` groups from `group` on.
inline void prefetch_groups(const Matrix& m, std::size_t row, std::size_t group, std::size_t groups) {
  const std::size_t at = row * m.groups + group;
  for (std::size_t g = 0; g < groups; g += 4) prefetch(m.packed + (at + g) * kGroupBytes);
  for (std::size_t g = 0; g < groups; g += 32) prefetch(m.scale + at + g);
}

// bf16 to fp32; writes up to the next multiple of 16, zeros there.
inline void load_scales(const std::uint16_t* scale, std::size_t n, float* out) {
#if MOEBOX_ISA_AVX512
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 here = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, scale + i));
    _mm512_storeu_si512(out + i, _mm512_slli_epi32(bits, 16));
  }
#else
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, scale + i, sizeof bits);
    out[i] = bf16_to_float(bits);
  }
  for (std::size_t i = n; i % 16 != 0; ++i) out[i] = 0;
#endif
}

#if MOEBOX_ISA_AVX512

inline __m512i broadcast_group(const std::uint8_t* packed) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

inline __m512 int4_values() { return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }

inline float sum(__m512 v) { return _mm512_reduce_add_ps(v); }

// The sums of four vectors, in one.
inline __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 lanes =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

struct Fp32 {
  using Elem = float;
  static constexpr auto prepare = prepare_fp32;
  using Data = __m512;
  using Acc = __m512;
  static constexpr std::size_t kStep = 16, kTokens = 6, kPanelGroups = 16;

  static Acc zero() { return _mm512_setzero_ps(); }
  static Data load(const Elem* at) { return _mm512_loadu_ps(at); }
  static Acc madd(Data a, Data b, Acc acc) { return _mm512_fmadd_ps(a, b, acc); }

  // Exact: a 4-bit integer times an 8-bit significand.
  static void dequantize(const std::uint8_t* packed, float scale, Elem* out) {
    const __m512 values = _mm512_mul_ps(int4_values(), _mm512_set1_ps(scale));
    const __m512i raw = broadcast_group(packed);
    const __m512i low = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16));
    // vpermps looks at the low four bits of each index only
    _mm512_store_ps(out, _mm512_permutexvar_ps(_mm512_srlv_epi32(raw, low), values));
    _mm512_store_ps(out + 16, _mm512_permutexvar_ps(_mm512_srlv_epi32(raw, high), values));
  }
};

#elif MOEBOX_ISA_AVX2

inline __m256i broadcast_group(const std::uint8_t* packed) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

inline float sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline __m128 sum4(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
}

struct Fp32 {
  using Elem = float;
  static constexpr auto prepare = prepare_fp32;
  using Data = __m256;
  using Acc = __m256;
  static constexpr std::size_t kStep = 8, kTokens = 3, kPanelGroups = 16;

  static Acc zero() { return _mm256_setzero_ps(); }
  static Data load(const Elem* at) { return _mm256_loadu_ps(at); }
  static Acc madd(Data a, Data b, Acc acc) { return _mm256_fmadd_ps(a, b, acc); }

  static void dequantize(const std::uint8_t* packed, float scale, Elem* out) {
    const __m256 factor = _mm256_set1_ps(scale), minus8 = _mm256_set1_ps(-8 * scale);
    const __m256i raw = broadcast_group(packed);
    for (int i = 0; i < 4; ++i) {
      const __m256i shifts =
          _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4), _mm256_set1_epi32(8 * i));
      const __m256i u = _mm256_and_si256(_mm256_srlv_epi32(raw, shifts), _mm256_set1_epi32(15));
      _mm256_store_ps(out + 8 * i, _mm256_fmadd_ps(_mm256_cvtepi32_ps(u), factor, minus8));
    }
  }
};

#else

struct Fp32 {
  using Elem = float;
  static constexpr auto prepare = prepare_fp32;
  using Data = float;
  using Acc = float;
  static constexpr std::size_t kStep = 1, kTokens = 2, kPanelGroups = 16;

  static Acc zero() { return 0; }
  static Data load(const Elem* at) { return *at; }
  static Acc madd(Data a, Data b, Acc acc) { return acc + a * b; }

  static void dequantize(const std::uint8_t* packed, float scale, Elem* out) {
    for (std::size_t i = 0; i < kGroup; ++i) {
      const int u = packed[i / 2] >> (i % 2 * 4) & 15;
      out[i % 8 * 4 + i / 8] = static_cast<float>(u - 8) * scale;
    }
  }
};

#endif

}  // namespace
}  // namespace moebox::MOEBOX_ISA
