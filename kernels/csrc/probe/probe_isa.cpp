// The probe of one instruction set.
#include <cstring>

#include "amx_isa.h"
#include "probe/probe.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moebox::MOEBOX_ISA {
namespace {

#if MOEBOX_ISA_AVX512
using Vector = __m512;
Vector zero() { return _mm512_setzero_ps(); }
Vector load(const std::uint8_t* at) { return _mm512_loadu_ps(at); }
Vector either(Vector a, Vector b) { return _mm512_xor_ps(a, b); }
#elif MOEBOX_ISA_AVX2
using Vector = __m256;
Vector zero() { return _mm256_setzero_ps(); }
Vector load(const std::uint8_t* at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }
Vector either(Vector a, Vector b) { return _mm256_xor_ps(a, b); }
#else
using Vector = std::uint64_t;
Vector zero() { return 0; }
Vector load(const std::uint8_t* at) {
  Vector v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
Vector either(Vector a, Vector b) { return a ^ b; }
#endif

std::uint64_t read(const std::uint8_t* at, std::size_t n) {
  constexpr std::size_t kVectors = 8, kStep = kVectors * sizeof(Vector), kAhead = 4096;
  Vector all[kVectors];
  for (Vector& v : all) v = zero();
  const std::uint8_t* end = at + n / kStep * kStep;
  for (; at < end; at += kStep) {
    for (std::size_t i = 0; i < kStep; i += 64) __builtin_prefetch(at + kAhead + i, 0, 3);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kVectors; ++i) all[i] = either(all[i], load(at + i * sizeof(Vector)));
  }
  std::uint64_t words[sizeof all / 8], sum = 0;
  std::memcpy(words, all, sizeof all);
  for (std::uint64_t word : words) sum += word;
  for (std::size_t i = 0; i < n % kStep; ++i) sum += at[i];
  return sum;
}

#if MOEBOX_ISA_AMX
constexpr double kFlopsPerRound = 4.0 * 16 * 16 * 32 * 2;

void multiply(std::size_t rounds) {
  configure_tiles();
  for (std::size_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
#else
#if MOEBOX_ISA_AVX512BF16
using Operand = __m512bh;
Operand one() { return (__m512bh)_mm512_setzero_si512(); }
Vector madd(Operand a, Vector acc) { return _mm512_dpbf16_ps(acc, a, a); }
constexpr double kLanes = 32;
#elif MOEBOX_ISA_AVX512
using Operand = __m512;
Operand one() { return _mm512_set1_ps(1); }
Vector madd(Operand a, Vector acc) { return _mm512_fmadd_ps(a, a, acc); }
constexpr double kLanes = 16;
#elif MOEBOX_ISA_AVX2
using Operand = __m256;
Operand one() { return _mm256_set1_ps(1); }
Vector madd(Operand a, Vector acc) { return _mm256_fmadd_ps(a, a, acc); }
constexpr double kLanes = 8;
#else
using Operand = float;
Operand one() { return 1; }
float madd(Operand a, float acc) { return acc + a * a; }
constexpr double kLanes = 1;
#endif

#if MOEBOX_ISA_AVX2
using Sum = Vector;
#else
using Sum = float;
#endif

// Makes the compiler treat a value as unknown, and as used.
template <class T>
void hide(T& value) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(value));
#else
  __asm__ volatile("" : "+w"(value));
#endif
}

constexpr std::size_t kChains = 12;
constexpr double kFlopsPerRound = kChains * kLanes * 2;

void multiply(std::size_t rounds) {
  Operand a = one();
  Sum acc[kChains] = {};
  hide(a);
  for (Sum& sum : acc) hide(sum);
  for (std::size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (Sum& sum : acc) sum = madd(a, sum);
  }
  for (Sum& sum : acc) hide(sum);
}
#endif

}  // namespace

const Probe kProbe = {read, multiply, kFlopsPerRound};

}  // namespace moebox::MOEBOX_ISA
