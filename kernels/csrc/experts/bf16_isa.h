// bf16 operands for the panels of bf16_panel_isa.h and tile_isa.h: weights become bf16 by a table look-up,
// and products are summed in fp32.
//
// Elements stand in the order "nibble j of words 0..7, for j = 0..3", where a word has 16 bits.
#pragma once

#include "experts/math_isa.h"

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

  // A table holds the group's sixteen values: products in fp32, whose upper halves are bf16 after rounding,
  // so value u is the table's word 2u + 1. Rotating each 128-bit lane's double words brings nibble j to bits
  // 1 to 4 of the words, as their index.
  static void dequantize(const std::uint8_t* packed, float scale, Elem* out) {
    const __m512i lanes = _mm512_setr_epi32(31, 31, 31, 31, 3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 11, 11);
    const __m512i values = (__m512i)_mm512_mul_ps(int4_values(), _mm512_set1_ps(scale));
    const __m512i table = _mm512_add_epi32(values, _mm512_set1_epi32(0x8000));
    const __m512i rotated = _mm512_rorv_epi32(broadcast_group(packed), lanes);
    const __m512i index = _mm512_or_si512(rotated, _mm512_set1_epi16(1));
    _mm512_store_si512(out, _mm512_permutexvar_epi16(index, table));
  }

  // A group of activations, in the weights' order.
  static __m512i regrouped(const void* row, std::size_t group, bool bf16) {
    const auto* at = static_cast<const std::uint8_t*>(row) + group * kGroup * (bf16 ? 2 : 4);
    const __m512i bits = bf16 ? _mm512_loadu_si512(at)
                              : (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(at + 64), _mm512_loadu_ps(at));
    alignas(64) static constexpr std::uint16_t kOrder[kGroup] = {0,  4,  8,  12, 16, 20, 24, 28, 1,  5,  9,
                                                                 13, 17, 21, 25, 29, 2,  6,  10, 14, 18, 22,
                                                                 26, 30, 3,  7,  11, 15, 19, 23, 27, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), bits);
  }
  static void prepare(const void* row, std::size_t group, bool bf16, Elem* out) {
    _mm512_storeu_si512(out, regrouped(row, group, bf16));
  }
};

}  // namespace
}  // namespace moebox::MOEBOX_ISA

#endif
