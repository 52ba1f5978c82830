// Panel and row math with AVX-512 BF16: weights are looked up as bf16, products summed in fp32.
#pragma once

#include "math_isa.h"

#if MOEBOX_ISA_AVX512BF16

namespace moebox::MOEBOX_ISA {
namespace {

struct Bf16 {
  using Elem = std::uint16_t;
  using Data = __m512bh;
  using Acc = __m512;
  static constexpr std::size_t kStep = 32, kTokens = 6, kPanelGroups = 32;

  static Acc zero() { return _mm512_setzero_ps(); }
  static Data load(const Elem* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static Acc madd(Data a, Data b, Acc acc) { return _mm512_dpbf16_ps(acc, a, b); }

  // The sixteen values of a group, rounded to bf16, twice: vpermw looks at five bits of each index, and the
  // fifth is the next nibble's.
  static void dequantize(const std::uint8_t* packed, float scale, Elem* out) {
    const __m512 values = _mm512_mul_ps(int4_values(), _mm512_set1_ps(scale));
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);
    const __m512i index = _mm512_srlv_epi16(broadcast_group(packed), lane_shifts16());
    _mm512_store_si512(out, _mm512_permutexvar_epi16(index, table));
  }

  // As row math: unscaled integers, exact in bf16; a group's sum is scaled in fp32.
  using Nibbles = __m512bh;
  struct Operand {
    const Elem* x;
  };
  static std::size_t bytes(std::size_t groups) { return groups * kGroup * sizeof(Elem); }
  static void prepare(const float* in, std::size_t group, std::size_t, std::byte* at) {
    auto* out = reinterpret_cast<Elem*>(at) + group * kGroup;
    for (std::size_t i = 0; i < kGroup; ++i) out[position16(i)] = float_to_bf16(in[i]);
  }
  static Operand operand(const std::byte* at, std::size_t) { return {reinterpret_cast<const Elem*>(at)}; }

  static Nibbles spread(const std::uint8_t* packed) {
    const __m512 values = int4_values();
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);
    const __m512i index = _mm512_srlv_epi16(broadcast_group(packed), lane_shifts16());
    return (__m512bh)_mm512_permutexvar_epi16(index, table);
  }
  static Acc madd(Nibbles q, const Elem* x, float scale, Acc acc) {
    return _mm512_fmadd_ps(_mm512_dpbf16_ps(zero(), q, load(x)), _mm512_set1_ps(scale), acc);
  }
  static Acc scales(const std::uint16_t* weight, const Operand&, std::size_t, std::size_t n, float* out) {
    for (std::size_t i = 0; i < n; i += 16) {
      const __mmask16 here = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, weight + i));
      _mm512_store_si512(out + i, _mm512_slli_epi32(bits, 16));
    }
    return zero();
  }
};

inline void regroup(const float* in, std::uint16_t* out) {
  for (std::size_t i = 0; i < kGroup; ++i) out[position16(i)] = float_to_bf16(in[i]);
}

}  // namespace
}  // namespace moebox::MOEBOX_ISA

#endif
