// Loading of weights, scales and activations, which the engines of every instruction set share. Only
// experts_isa.cpp includes it.
//
// All of it is in an anonymous namespace of the set's own namespace. If several sets shared an inline
// function, the linker would keep one copy of it for every machine, which could be the one with AVX-512
// instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "experts/experts.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moebox::MOEBOX_ISA {
namespace {

inline float bf16_to_float(std::uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
}

// A group of activations as fp32.
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

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// Prefetches one row of a panel: `groups` groups from `group` on.
inline void prefetch_groups(const Matrix& m, std::size_t row, std::size_t group, std::size_t groups) {
  const std::size_t at = row * m.stride + group;
  for (std::size_t g = 0; g < groups; g += 4) prefetch(m.packed + (at + g) * kGroupBytes);
  for (std::size_t g = 0; g < groups; g += 32) prefetch(m.scale + at + g);
}

// bf16 to fp32. Writes zeros from n up to the next multiple of 16.
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

// A group's 16 bytes in every 128-bit lane.
inline __m512i broadcast_group(const std::uint8_t* packed) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

inline __m512 int4_values() { return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }

inline float sum(__m512 v) { return _mm512_reduce_add_ps(v); }

#elif MOEBOX_ISA_AVX2

inline __m256i broadcast_group(const std::uint8_t* packed) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

inline float sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#endif

}  // namespace
}  // namespace moebox::MOEBOX_ISA
