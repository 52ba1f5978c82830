// The arithmetic of row_isa.h: activations are 16-bit integers with a power-of-two scale per group.
//
// A bf16 activation that is at most 2^7 times smaller than the largest of its group of 32 stays exact; any
// other is off by at most 2^-15 of that largest one. So this is finer than bf16. Integer products are exact,
// a group's sum of two products fits fp32 exactly, and sums over groups are fp32. vpmaddwd makes twice the
// products of an fp32 multiply-add, and its operand takes half the room in the first-level cache.
#pragma once

#include "experts/math_isa.h"

#if MOEBOX_ISA_AVX2

namespace moebox::MOEBOX_ISA {
namespace {

struct Int16 {
  // Groups that are multiplied at a time: with AVX-512 one for each of a vector's four 128-bit lanes, with
  // AVX2 one.
  static constexpr std::size_t kChunk =
#if MOEBOX_ISA_AVX512
      4;
#else
      1;
#endif

  // One token's operand: int16 x[groups][32], each chunk in the order "nibble j of the chunk's words, for
  // j = 0..3"; then fp32 scale[groups]; then fp32 offset[groups] = -8 * sum(x), since products are made with
  // u = q + 8. All three are padded with zeros.
  struct Operand {
    const std::int16_t* x;
    const float* scale;
    const float* offset;
  };

  static constexpr std::size_t padded(std::size_t groups, std::size_t to) {
    return (groups + to - 1) / to * to;
  }
  // Scales and offsets are read in whole vectors, of at most 16.
  static std::size_t slots(std::size_t groups) { return padded(groups, 16); }
  static std::size_t x_bytes(std::size_t groups) { return padded(groups, kChunk) * 2 * kGroup; }
  static std::size_t bytes(std::size_t groups) { return x_bytes(groups) + slots(groups) * 8; }

  static Operand operand(const std::byte* at, std::size_t groups) {
    const auto* x = reinterpret_cast<const std::int16_t*>(at);
    const auto* scale = reinterpret_cast<const float*>(at + x_bytes(groups));
    return {x, scale, scale + slots(groups)};
  }

  // Where element i of a group stands in x.
  static std::size_t position(std::size_t group, std::size_t i) {
    const std::size_t word = group % kChunk * 8 + i / 4;
    return group / kChunk * kChunk * kGroup + i % 4 * 8 * kChunk + word;
  }

  static void prepare(const float* in, std::size_t group, std::size_t groups, std::byte* at) {
    auto* x = reinterpret_cast<std::int16_t*>(at);
    auto* scale = reinterpret_cast<float*>(at + x_bytes(groups)) + group;
    std::uint32_t largest = 0;  // of the magnitudes' bits, where NaN is above all
    for (std::size_t i = 0; i < kGroup; ++i) {
      const std::uint32_t magnitude = __builtin_bit_cast(std::uint32_t, in[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const std::uint32_t exponent = largest >> 23;
    // The power of two of the largest magnitude becomes 2^14. Below 2^-112 a group counts as zero.
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
      x[position(group, i)] = static_cast<std::int16_t>(rounded[i]);
    }
    scale[0] = exponent == 255 ? __builtin_nanf("") : exponent < 15 ? 0.0f : 1.0f / inverse;
    scale[slots(groups)] = -8.0f * static_cast<float>(total);
  }

#if MOEBOX_ISA_AVX512
  // u of each word's nibbles 0 and 2, and 16 u of its nibbles 1 and 3, which saves two shifts.
  struct Nibbles {
    __m512i even[2], odd16[2];
  };
  using Acc = __m512;
  static Acc zero() { return _mm512_setzero_ps(); }

  static Nibbles spread(const std::uint8_t* packed) { return spread(_mm512_loadu_si512(packed)); }
  static Nibbles spread_some(const std::uint8_t* packed, std::size_t groups) {
    return spread(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << 4 * groups) - 1), packed));
  }
  static Nibbles spread(__m512i words) {
    const __m512i low = _mm512_set1_epi16(0x000f), high = _mm512_set1_epi16(0x00f0);
    const __m512i upper = _mm512_srli_epi16(words, 8);
    return {{_mm512_and_si512(words, low), _mm512_and_si512(upper, low)},
            {_mm512_and_si512(words, high), _mm512_and_si512(upper, high)}};
  }

  // The four sums of a 128-bit lane belong to one group.
  static Acc madd(const Nibbles& u, const std::int16_t* x, const float* scale, Acc acc) {
    const __m512i even = _mm512_add_epi32(_mm512_madd_epi16(u.even[0], _mm512_load_si512(x)),
                                          _mm512_madd_epi16(u.even[1], _mm512_load_si512(x + 64)));
    const __m512i odd16 = _mm512_add_epi32(_mm512_madd_epi16(u.odd16[0], _mm512_load_si512(x + 32)),
                                           _mm512_madd_epi16(u.odd16[1], _mm512_load_si512(x + 96)));
    const __m512i sums = _mm512_add_epi32(even, _mm512_srai_epi32(odd16, 4));
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512 factor = _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_load_ps(scale)), lane);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), factor, acc);
  }

  // out[i] = weight scale i * activation scale i. Returns the sum of out[i] * offset[i], by lane.
  static Acc scales(const std::uint16_t* weight, const Operand& x, std::size_t group, std::size_t n,
                    float* out) {
    Acc offsets = zero();
    load_scales(weight, n, out);
    for (std::size_t i = 0; i < n; i += 16) {
      const __m512 both = _mm512_mul_ps(_mm512_load_ps(out + i), _mm512_loadu_ps(x.scale + group + i));
      _mm512_store_ps(out + i, both);
      offsets = _mm512_fmadd_ps(both, _mm512_loadu_ps(x.offset + group + i), offsets);
    }
    return offsets;
  }
#else
  struct Nibbles {
    __m256i low, high;
  };
  using Acc = __m256;
  static Acc zero() { return _mm256_setzero_ps(); }

  // Shifting double words moves bits from word to word, but none into a word's low four bits.
  static Nibbles spread(const std::uint8_t* packed) {
    const __m256i raw = broadcast_group(packed), mask = _mm256_set1_epi16(15);
    const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    return {_mm256_and_si256(_mm256_srlv_epi32(raw, shifts), mask),
            _mm256_and_si256(_mm256_srlv_epi32(raw, _mm256_add_epi32(shifts, _mm256_set1_epi32(8))), mask)};
  }
  static Acc madd(const Nibbles& u, const std::int16_t* x, const float* scale, Acc acc) {
    const auto* at = reinterpret_cast<const __m256i*>(x);
    const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(u.low, _mm256_load_si256(at)),
                                              _mm256_madd_epi16(u.high, _mm256_load_si256(at + 1)));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(*scale), acc);
  }

  static Nibbles spread_some(const std::uint8_t* packed, std::size_t) { return spread(packed); }

  static Acc scales(const std::uint16_t* weight, const Operand& x, std::size_t group, std::size_t n,
                    float* out) {
    Acc offsets = zero();
    load_scales(weight, n, out);
    for (std::size_t i = 0; i < n; i += 8) {
      const __m256 both = _mm256_mul_ps(_mm256_load_ps(out + i), _mm256_loadu_ps(x.scale + group + i));
      _mm256_store_ps(out + i, both);
      offsets = _mm256_fmadd_ps(both, _mm256_loadu_ps(x.offset + group + i), offsets);
    }
    return offsets;
  }
#endif
};

}  // namespace
}  // namespace moebox::MOEBOX_ISA

#endif
