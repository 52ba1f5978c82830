// The few vector operations that quantize_isa.cpp needs beyond GCC's vector arithmetic, for each instruction
// set. A vector has kWidth lanes of 32 bits; a lane's result does not depend on kWidth.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if MOEBOX_ISA_AVX2
#include <immintrin.h>
#endif

// GCC 12 warns of undefined operands in its own AVX-512 header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace moebox::MOEBOX_ISA {

#if MOEBOX_ISA_AVX512
constexpr int kWidth = 16;
#elif MOEBOX_ISA_AVX2
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t I32 __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t U32 __attribute__((vector_size(4 * kWidth)));
typedef std::int16_t I16 __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t U16 __attribute__((vector_size(2 * kWidth)));

template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

constexpr auto kFp8AsHalf = static_cast<std::int16_t>(0xbf80);  // sign, 4 bits of exponent, 3 of mantissa

inline F32 as_float(I32 v) { return reinterpret_cast<F32>(v); }
inline I32 as_int(F32 v) { return reinterpret_cast<I32>(v); }
inline F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }
inline I32 abs_bits(F32 v) { return as_int(v) & 0x7fffffff; }  // ordered as |v|, NaN above Inf

#if MOEBOX_ISA_AVX512

inline I16 mulhrs(I16 a, I16 b) { return (I16)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
inline I32 madd(I16 a, I16 b) { return (I32)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
inline I16 min(I16 a, I16 b) { return (I16)_mm512_min_epi16((__m512i)a, (__m512i)b); }
inline I16 max(I16 a, I16 b) { return (I16)_mm512_max_epi16((__m512i)a, (__m512i)b); }
inline I32 min(I32 a, I32 b) { return (I32)_mm512_min_epi32((__m512i)a, (__m512i)b); }
inline I32 max(I32 a, I32 b) { return (I32)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline I32 round_to_int(F32 v) { return (I32)_mm512_cvtps_epi32((__m512)v); }

// Halves the width of two vectors' elements, with saturation. The order of the result differs between sets.
inline I16 narrow(I32 a, I32 b) { return (I16)_mm512_packs_epi32((__m512i)a, (__m512i)b); }

inline F32 half_to_float(const std::uint16_t* from) {
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Two vectors of e4m3 values / 256; NaN is not handled. The bits of an e4m3, moved into a half, mean a value
// that is 2^8 times smaller.
inline void fp8_to_float(const std::uint8_t* from, F32* two) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(kFp8AsHalf));
  two[0] = (F32)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  two[1] = (F32)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

// 32 values 0..15 -> 4 words, the first value in the low nibble.
inline void pack_nibbles(const I32* values, std::uint32_t* words) {
  const __m128i low = _mm512_cvtepi32_epi8((__m512i)values[0]);
  const __m128i high = _mm512_cvtepi32_epi8((__m512i)values[1]);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set_m128i(high, low), _mm256_set1_epi16(0x1001));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm256_cvtepi16_epi8(pairs));
}

// words [kWidth][16] -> columns [16][kWidth].
inline void transpose(const std::int32_t* words, std::int32_t* columns) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(words + 16 * i);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; j++) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_si512(columns + 16 * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(columns + 16 * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

#else

inline void transpose(const std::int32_t* words, std::int32_t* columns) {
  for (int k = 0; k < 16; k++)
    for (int g = 0; g < kWidth; g++) columns[kWidth * k + g] = words[16 * g + k];
}

#if MOEBOX_ISA_AVX2

inline I16 mulhrs(I16 a, I16 b) { return (I16)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
inline I32 madd(I16 a, I16 b) { return (I32)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline I16 min(I16 a, I16 b) { return (I16)_mm256_min_epi16((__m256i)a, (__m256i)b); }
inline I16 max(I16 a, I16 b) { return (I16)_mm256_max_epi16((__m256i)a, (__m256i)b); }
inline I32 min(I32 a, I32 b) { return (I32)_mm256_min_epi32((__m256i)a, (__m256i)b); }
inline I32 max(I32 a, I32 b) { return (I32)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline I32 round_to_int(F32 v) { return (I32)_mm256_cvtps_epi32((__m256)v); }
inline I16 narrow(I32 a, I32 b) { return (I16)_mm256_packs_epi32((__m256i)a, (__m256i)b); }

inline F32 half_to_float(const std::uint16_t* from) {
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void fp8_to_float(const std::uint8_t* from, F32* two) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(kFp8AsHalf));
  two[0] = (F32)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  two[1] = (F32)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

inline void pack_nibbles(const I32* values, std::uint32_t* words) {
  const __m256i low = _mm256_packs_epi32((__m256i)values[0], (__m256i)values[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)values[2], (__m256i)values[3]);
  const __m256i bytes =
      _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm256_castsi256_si128(packed));
}

#else

inline I16 mulhrs(I16 a, I16 b) {
  for (int i = 0; i < 2 * kWidth; i++) a[i] = static_cast<std::int16_t>((a[i] * b[i] + (1 << 14)) >> 15);
  return a;
}

inline I32 madd(I16 a, I16 b) {
  I32 sums;
  for (int i = 0; i < kWidth; i++) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
}

inline I16 min(I16 a, I16 b) { return a < b ? a : b; }
inline I16 max(I16 a, I16 b) { return a > b ? a : b; }
inline I32 min(I32 a, I32 b) { return a < b ? a : b; }
inline I32 max(I32 a, I32 b) { return a > b ? a : b; }

inline I32 round_to_int(F32 v) {
  I32 rounded;
  for (int i = 0; i < kWidth; i++) rounded[i] = static_cast<std::int32_t>(std::lrint(v[i]));
  return rounded;
}

inline I16 narrow(I32 a, I32 b) {
  I16 halves;
  for (int i = 0; i < kWidth; i++) {
    halves[i] = static_cast<std::int16_t>(a[i] > 32767 ? 32767 : a[i] < -32768 ? -32768 : a[i]);
    halves[kWidth + i] = static_cast<std::int16_t>(b[i] > 32767 ? 32767 : b[i] < -32768 ? -32768 : b[i]);
  }
  return halves;
}

inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(mantissa);
  const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  const std::uint32_t word = sign | wide << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline F32 half_to_float(const std::uint16_t* from) {
  F32 values;
  for (int i = 0; i < kWidth; i++) values[i] = half_to_float(from[i]);
  return values;
}

inline void fp8_to_float(const std::uint8_t* from, F32* two) {
  for (int i = 0; i < 2 * kWidth; i++) {
    const auto wide = static_cast<unsigned>(static_cast<std::int8_t>(from[i]));
    two[i / kWidth][i % kWidth] = half_to_float(static_cast<std::uint16_t>(wide << 7 & kFp8AsHalf));
  }
}

inline void pack_nibbles(const I32* values, std::uint32_t* words) {
  for (int w = 0; w < 4; w++) {
    std::uint32_t word = 0;
    for (int n = 0; n < 8; n++) {
      const int i = 8 * w + n;
      word |= static_cast<std::uint32_t>(values[i / kWidth][i % kWidth]) << (4 * n);
    }
    words[w] = word;
  }
}

#endif
#endif

}  // namespace moebox::MOEBOX_ISA
