// Row math without bf16 instructions: activations as 16-bit integers with a power-of-two scale per group.
//
// A bf16 activation no more than 2^7 below the largest of its group of 32 is exact, any other is off by at
// most 2^-15 of that largest one; so this is finer than bf16. Integer products are exact, a group's sum of
// two products fits fp32 exactly, and sums over groups are fp32. vpmaddwd does twice the products of an fp32
// multiply-add, and its operand takes half the first-level cache.
#pragma once

#include "math_isa.h"

#if MOEBOX_ISA_AVX2

namespace moebox::MOEBOX_ISA {
namespace {

struct Int16 {
  // One token's operand: int16 x[groups][32], then fp32 scale[groups], then fp32 offset[groups], which is
  // -8 * scale * sum(x): the products are made with u = q + 8.
  struct Operand {
    const std::int16_t* x;
    const float* scale;
    const float* offset;
  };

  static std::size_t bytes(std::size_t groups) { return (groups * (2 * kGroup + 8) + 63) / 64 * 64; }

  static Operand operand(const std::byte* at, std::size_t groups) {
    const auto* x = reinterpret_cast<const std::int16_t*>(at);
    const auto* scale = reinterpret_cast<const float*>(at + groups * 2 * kGroup);
    return {x, scale, scale + groups};
  }

  static void prepare(const float* in, std::size_t group, std::size_t groups, std::byte* at) {
    auto* x = reinterpret_cast<std::int16_t*>(at) + group * kGroup;
    auto* scale = reinterpret_cast<float*>(at + groups * 2 * kGroup) + group;
    std::uint32_t largest = 0;  // of the magnitudes' bits: NaN ranks above all
    for (std::size_t i = 0; i < kGroup; ++i) {
      const std::uint32_t magnitude = __builtin_bit_cast(std::uint32_t, in[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const std::uint32_t exponent = largest >> 23;
    // 2^14 stands for the largest one's power of two. Below 2^-112 a group counts as zero.
    const float inverse = exponent < 15 || exponent == 255
                              ? 0.0f
                              : __builtin_bit_cast(float, (127 + 14 + 127 - exponent) << 23);
    std::int32_t rounded[kGroup], total = 0;
    for (std::size_t i = 0; i < kGroup; ++i) {
      const float v = inverse == 0.0f ? 0.0f : in[i] * inverse;
      constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
      const float integer = (v + kRound) - kRound;
      rounded[i] = static_cast<std::int32_t>(integer > 32767.0f ? 32767.0f : integer);
      rounded[i] = rounded[i] < -32767 ? -32767 : rounded[i];
    }
    for (std::size_t i = 0; i < kGroup; ++i) {
      total += rounded[i];
      x[position16(i)] = static_cast<std::int16_t>(rounded[i]);
    }
    scale[0] = exponent == 255 ? __builtin_nanf("") : exponent < 15 ? 0.0f : 1.0f / inverse;
    scale[groups] = -8.0f * static_cast<float>(total);
  }

#if MOEBOX_ISA_AVX512
  using Nibbles = __m512i;
  using Acc = __m512;
  static Acc zero() { return _mm512_setzero_ps(); }

  static Nibbles spread(const std::uint8_t* packed) {
    return _mm512_and_si512(_mm512_srlv_epi16(broadcast_group(packed), lane_shifts16()),
                            _mm512_set1_epi16(15));
  }
  static Acc madd(Nibbles u, const std::int16_t* x, float scale, Acc acc) {
    const __m512i products = _mm512_madd_epi16(u, _mm512_load_si512(x));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scale), acc);
  }

  // out[i] = weight scale i * activation scale i; returns the groups' offsets, summed by lane.
  static Acc scales(const std::uint16_t* weight, const Operand& x, std::size_t group, std::size_t n,
                    float* out) {
    Acc offsets = zero();
    for (std::size_t i = 0; i < n; i += 16) {
      const __mmask16 here = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, weight + i));
      const __m512 factor = _mm512_maskz_loadu_ps(here, x.scale + group + i);
      const __m512 both = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), factor);
      _mm512_store_ps(out + i, both);
      offsets = _mm512_fmadd_ps(both, _mm512_maskz_loadu_ps(here, x.offset + group + i), offsets);
    }
    return offsets;
  }
#else
  struct Nibbles {
    __m256i low, high;
  };
  using Acc = __m256;
  static Acc zero() { return _mm256_setzero_ps(); }

  // Shifting double words moves bits across words, but never into a word's low four bits.
  static Nibbles spread(const std::uint8_t* packed) {
    const __m256i raw = broadcast_group(packed), mask = _mm256_set1_epi16(15);
    const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    return {_mm256_and_si256(_mm256_srlv_epi32(raw, shifts), mask),
            _mm256_and_si256(_mm256_srlv_epi32(raw, _mm256_add_epi32(shifts, _mm256_set1_epi32(8))), mask)};
  }
  static Acc madd(Nibbles u, const std::int16_t* x, float scale, Acc acc) {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(u.low, _mm256_load_si256(at)),
                                              _mm256_madd_epi16(u.high, _mm256_load_si256(at + 1)));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(scale), acc);
  }

  static Acc scales(const std::uint16_t* weight, const Operand& x, std::size_t group, std::size_t n,
                    float* out) {
    alignas(32) float offset[8] = {};
    for (std::size_t i = 0; i < n; ++i) out[i] = scale_at(weight, i) * x.scale[group + i];
    for (std::size_t i = 0; i < n; ++i) offset[i % 8] += out[i] * x.offset[group + i];
    return _mm256_load_ps(offset);
  }
#endif
};

}  // namespace
}  // namespace moebox::MOEBOX_ISA

#endif
