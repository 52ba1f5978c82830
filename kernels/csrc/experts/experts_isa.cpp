// Chooses the engines of one instruction set and makes them its table of expert kernels.
#include "experts/bf16_isa.h"
#include "experts/bf16_panel_isa.h"
#include "experts/experts.h"
#include "experts/fp32_panel_isa.h"
#include "experts/int16_isa.h"
#include "experts/math_isa.h"
#include "experts/row_isa.h"
#include "experts/tile_isa.h"

namespace moebox::MOEBOX_ISA {
namespace {

// exp by Cody and Waite's reduction and Cephes' polynomial, within 2 ulp. It has no call and no branch, so
// the compiler can vectorize it.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * __builtin_bit_cast(float, (static_cast<std::int32_t>(n) + 127) << 23);
}

void silu_mul(const float* gate, const float* up, float* h, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) h[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

constexpr Engine kExact = Fp32Panel::engine();
#if MOEBOX_ISA_AVX2
constexpr Engine kFew = RowByRow<Int16>::engine();
#else
constexpr Engine kFew = kExact;
#endif
#if MOEBOX_ISA_AMX
constexpr Engine kMany = Tiles::engine();
#elif MOEBOX_ISA_AVX512BF16
constexpr Engine kMany = Bf16Panel::engine();
#else
constexpr Engine kMany = kExact;
#endif
// With more tokens, a panel costs less than unpacking the nibbles for each token (measured).
#if MOEBOX_ISA_AMX
constexpr std::size_t kFewTokens = 5;
#else
constexpr std::size_t kFewTokens = 8;
#endif

}  // namespace

const ExpertKernels kExpertKernels = {kExact, kFew, kMany, kFewTokens, silu_mul};

}  // namespace moebox::MOEBOX_ISA
