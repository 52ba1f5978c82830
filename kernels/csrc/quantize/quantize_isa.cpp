// Quantizes or converts one row of a matrix. Compiled once per instruction set.
#include <iterator>

#include "quantize/lanes_isa.h"
#include "quantize/quantize.h"

namespace moebox::MOEBOX_ISA {
namespace {

constexpr std::int32_t kTooLarge = (127 + 60) << 23;    // bits of 2^60: squares and sums stay in range
constexpr std::int32_t kSmallestExponent = 127 - 60;    // biased; groups below it count as zeros
constexpr float kZeroGroupScale = 0x1p-14f;             // usable as bf16 and as f16
constexpr std::int32_t kBfloat16Overflow = 0x7f7f8000;  // rounds to Inf
constexpr int kPairs = kGroup / 2, kGroupVectors = kGroup / kWidth;

// |extreme| / |scale| to try; after the refit, finer or wider grids gain less than 0.02 % (docs/LOG.md).
constexpr float kRatios[] = {6.4f, 6.8f, 7.1f, 7.35f, 7.6f, 7.8f, 8.0f, 8.2f, 8.4f, 8.6f, 8.8f, 9.05f};
constexpr float kUnclampedRatio = 8.45f;  // below it, the extreme value rounds to no less than -8
constexpr int kTogether = kWidth / 4;     // ratios that are tried at once: as many as the registers hold
static_assert(std::size(kRatios) % kTogether == 0);

// std::min could be compiled as a function, and the linker could take it from another instruction set's
// object.
inline std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

// ---- reading a row as fp32 ----

// Both decoders write whole vectors, with zeros from `count` on.
template <SourceType type>
void decode_plain(const std::uint8_t* from, std::size_t count, float* out) {
  constexpr std::size_t item = type == SourceType::f32 ? 4 : 2;
  std::uint8_t tail[4 * kWidth] = {};
  for (std::size_t i = 0; i < count; i += kWidth, from += kWidth * item) {
    if (count - i < kWidth) std::memcpy(tail, from, (count - i) * item);
    const std::uint8_t* whole = count - i < kWidth ? tail : from;
    if constexpr (type == SourceType::f32) store(out + i, load<F32>(whole));
    if constexpr (type == SourceType::bf16)
      store(out + i, __builtin_convertvector(load<U16>(whole), I32) << 16);
    if constexpr (type == SourceType::f16)
      store(out + i, half_to_float(reinterpret_cast<const std::uint16_t*>(whole)));
  }
}

void decode_fp8(const std::uint8_t* from, std::size_t count, float factor, float* out) {
  std::uint8_t tail[2 * kWidth] = {}, nan = 0;
  for (std::size_t i = 0; i < count; i += 2 * kWidth) {
    if (count - i < 2 * kWidth) std::memcpy(tail, from + i, count - i);
    F32 two[2];
    fp8_to_float(count - i < 2 * kWidth ? tail : from + i, two);
    store(out + i, two[0] * (factor * 256));
    store(out + i + kWidth, two[1] * (factor * 256));
  }
  for (std::size_t i = 0; i < count; i++) nan |= static_cast<std::uint8_t>((from[i] & 0x7f) == 0x7f);
  if (!nan) return;
  for (std::size_t i = 0; i < count; i++)
    if ((from[i] & 0x7f) == 0x7f) out[i] = __builtin_nanf("");
}

// Columns first .. first + count of a row as fp32; first is a multiple of kFp8Block.
void decode(const SourceMatrix& source, std::size_t row, std::size_t first, std::size_t count, float* out) {
  const std::uint8_t* from = source.data + (row * source.columns + first) * source.item_bytes();
  switch (source.type) {
    case SourceType::f32:
      return decode_plain<SourceType::f32>(from, count, out);
    case SourceType::bf16:
      return decode_plain<SourceType::bf16>(from, count, out);
    case SourceType::f16:
      return decode_plain<SourceType::f16>(from, count, out);
    case SourceType::fp8:
      break;
  }
  const float* factor = source.scale_inv + row / kFp8Block * source.block_columns() + first / kFp8Block;
  for (std::size_t i = 0; i < count; i += kFp8Block)
    decode_fp8(from + i, smaller(kFp8Block, count - i), *factor++, out + i);
}

inline std::int32_t largest(I32 v) {
  std::int32_t result = v[0];
  for (int i = 1; i < kWidth; i++) result = result < v[i] ? v[i] : result;
  return result;
}

// The column of the first value whose magnitude has at least the bits of `limit`; there must be one. `first`
// is the column of values[0].
std::ptrdiff_t find_bad(const float* values, std::size_t first, std::int32_t limit) {
  std::ptrdiff_t i = 0;
  for (;; i++) {
    std::int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    if ((bits & 0x7fffffff) >= limit) return static_cast<std::ptrdiff_t>(first) + i;
  }
}

inline F32 round_to_bfloat16(F32 v) {
  const I32 bits = as_int(v);
  return as_float((bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<std::int32_t>(0xffff0000u));
}

// ---- kWidth groups of a row: one group per lane ----

struct Tile {
  alignas(64) float weights[kWidth * kGroup];
  alignas(64) std::int32_t exponents[kWidth];       // biased, of the largest magnitude
  alignas(64) std::int32_t fixed[kWidth * kPairs];  // int16 pairs: weights * 2^(14 - exponent)
  alignas(64) float scales[kWidth], inverses[kWidth];
};

// Largest magnitude of each lane's group, as bits.
inline I32 group_magnitudes(const float* weights) {
  alignas(64) std::int32_t rows[kWidth * kPairs], columns[kWidth * kPairs];
  for (int i = 0; i < kWidth * kPairs; i += kWidth) {
    const float* half = weights + i / kPairs * kGroup + i % kPairs;
    store(rows + i, max(abs_bits(load<F32>(half)), abs_bits(load<F32>(half + kPairs))));
  }
  transpose(rows, columns);
  I32 bits = load<I32>(columns);
  for (int k = 1; k < kPairs; k++) bits = max(bits, load<I32>(columns + k * kWidth));
  return bits;
}

// Scales every group to 15-bit integers, so that sums over it are exact in any order. Returns the bits of the
// tile's largest magnitude.
std::int32_t to_fixed(Tile& tile) {
  alignas(64) float factors[kWidth];
  const I32 magnitudes = group_magnitudes(tile.weights);
  const I32 exponents = magnitudes >> 23;  // biased
  store(tile.exponents, exponents);
  store(factors, exponents < kSmallestExponent ? F32{} : as_float((127 + 14 + 127 - exponents) << 23));
  for (int g = 0; g < kWidth; g++) {
    const float* weights = tile.weights + g * kGroup;
    for (int v = 0; v < kGroupVectors; v += 2) {
      const I32 even = round_to_int(load<F32>(weights + v * kWidth) * factors[g]);
      const I32 odd = round_to_int(load<F32>(weights + (v + 1) * kWidth) * factors[g]);
      store(tile.fixed + g * kPairs + v / 2 * kWidth, narrow(even, odd));
    }
  }
  return largest(magnitudes);
}

// The value of largest magnitude of each lane's group.
inline F32 extremes(const I16* pairs) {
  I16 high = pairs[0], low = pairs[0];
  for (int k = 1; k < kPairs; k++) {
    high = max(high, pairs[k]);
    low = min(low, pairs[k]);
  }
  const I32 highs = reinterpret_cast<I32>(high), lows = reinterpret_cast<I32>(low);
  const I32 largest = max(highs >> 16, (highs << 16) >> 16), smallest = min(lows >> 16, (lows << 16) >> 16);
  return to_float(largest > -smallest ? largest : smallest);
}

struct Fit {
  F32 product, square;  // sums over the group of weight * q and q * q
};

// For kTogether trial scales: rounds weights to q, and sums up what gives the best scale for these q.
template <bool clamp_extreme>
inline void fit(const I16* pairs, const I16* inverses, Fit* fits) {
  const I16 one = I16{} + 32, lowest = I16{} - 8, highest = I16{} + 7;
  I32 products[kTogether] = {}, squares[kTogether] = {};
  for (int k = 0; k < kPairs; k++) {
    for (int c = 0; c < kTogether; c++) {
      const I16 steps = mulhrs(pairs[k], inverses[c]);  // weight / scale, 10 fraction bits
      I16 q = min(mulhrs(steps, one), highest);
      if constexpr (clamp_extreme) q = max(q, lowest);
      products[c] += madd(pairs[k], q);
      squares[c] += madd(q, q);
    }
  }
  for (int c = 0; c < kTogether; c++) fits[c] = {to_float(products[c]), to_float(squares[c])};
}

// Sets the least-squares scale of each lane's group, bf16, with the sign that makes the extreme value's q
// negative.
void choose_scales(Tile& tile) {
  alignas(64) std::int32_t columns[kWidth * kPairs];
  I16 pairs[kPairs];
  transpose(tile.fixed, columns);
  for (int k = 0; k < kPairs; k++) pairs[k] = load<I16>(columns + k * kWidth);
  const F32 extreme = extremes(pairs);
  const F32 per_ratio = -0x1p25f / (extreme == 0.0f ? F32{} + 1.0f : extreme);
  Fit best = {F32{}, F32{} + 1.0f};
  for (std::size_t first = 0; first < std::size(kRatios); first += kTogether) {
    I16 inverses[kTogether];
    Fit fits[kTogether];
    for (int c = 0; c < kTogether; c++) {
      const I32 inverse = round_to_int(per_ratio * kRatios[first + c]);
      inverses[c] = reinterpret_cast<I16>((inverse & 0xffff) | (inverse << 16));
    }
    if (kRatios[first + kTogether - 1] < kUnclampedRatio)
      fit<false>(pairs, inverses, fits);
    else
      fit<true>(pairs, inverses, fits);
    for (const Fit& found : fits) {  // the error left after the refit is sum(w^2) - product^2 / square
      const auto better =
          found.product * found.product * best.square > best.product * best.product * found.square;
      best.product = better ? found.product : best.product;
      best.square = better ? found.square : best.square;
    }
  }
  const I32 exponents = load<I32>(tile.exponents);
  const F32 scale = round_to_bfloat16(best.product / best.square) * as_float((exponents - 14) << 23);
  const auto zero = best.product == 0.0f;
  store(tile.scales, zero ? F32{} + kZeroGroupScale : scale);
  store(tile.inverses, zero ? F32{} : 1.0f / scale);
}

// ---- values and error ----

// Sums over a row in 16 lanes, by column mod 16, for any kWidth: so that every set gives the same bits.
struct ErrorSums {
  static constexpr int kParts = 16 / kWidth;
  F32 errors[kParts] = {}, weights[kParts] = {};
  I32 max_bits{};

  RowError total() const {
    RowError sum;
    for (int i = 0; i < 16; i++) {
      sum.sum_sq_error += errors[i / kWidth][i % kWidth];
      sum.sum_sq += weights[i / kWidth][i % kWidth];
    }
    const std::int32_t bits = largest(max_bits);
    std::memcpy(&sum.max_abs, &bits, sizeof bits);
    return sum;
  }
};

inline void quantize_group(const float* weights, float scale, float inverse, std::uint32_t* packed,
                           ErrorSums& sums) {
  I32 nibbles[kGroupVectors];
  for (int v = 0; v < kGroupVectors; v++) {
    const F32 weight = load<F32>(weights + v * kWidth);
    const I32 q = max(min(round_to_int(weight * inverse), I32{} + 7), I32{} - 8);
    const F32 error = weight - to_float(q) * scale;
    sums.errors[v % ErrorSums::kParts] += error * error;
    sums.weights[v % ErrorSums::kParts] += weight * weight;
    sums.max_bits = max(sums.max_bits, abs_bits(error));
    nibbles[v] = q + 8;
  }
  pack_nibbles(nibbles, packed);
}

std::ptrdiff_t quantize_row(const SourceMatrix& source, std::size_t row, std::uint32_t* packed,
                            std::uint16_t* scale, RowError& error) {
  constexpr std::size_t kTileColumns = kWidth * kGroup;
  Tile tile;
  ErrorSums sums;
  for (std::size_t first = 0; first < source.columns; first += kTileColumns) {
    const std::size_t count = smaller(kTileColumns, source.columns - first);
    decode(source, row, first, count, tile.weights);
    if (count < kTileColumns) std::memset(tile.weights + count, 0, (kTileColumns - count) * sizeof(float));
    if (to_fixed(tile) >= kTooLarge) return find_bad(tile.weights, first, kTooLarge);
    choose_scales(tile);
    for (std::size_t g = 0; g < count / kGroup; g++) {
      quantize_group(tile.weights + g * kGroup, tile.scales[g], tile.inverses[g], packed, sums);
      std::uint32_t bits;
      std::memcpy(&bits, tile.scales + g, sizeof bits);
      *scale++ = static_cast<std::uint16_t>(bits >> 16);
      packed += kGroup / 8;
    }
  }
  error = sums.total();
  return kFinite;
}

std::ptrdiff_t convert_row(const SourceMatrix& source, std::size_t row, std::uint16_t* out) {
  constexpr std::size_t kChunk = 512;
  alignas(64) float values[kChunk];
  alignas(64) std::uint16_t halves[kChunk];
  for (std::size_t first = 0; first < source.columns; first += kChunk) {
    const std::size_t count = smaller(kChunk, source.columns - first);
    decode(source, row, first, count, values);
    I32 bits{};
    for (std::size_t i = 0; i < count; i += kWidth) {
      const F32 v = load<F32>(values + i);
      bits = max(bits, abs_bits(v));
      store(halves + i, __builtin_convertvector(reinterpret_cast<U32>(round_to_bfloat16(v)) >> 16, U16));
    }
    if (largest(bits) >= kBfloat16Overflow) return find_bad(values, first, kBfloat16Overflow);
    if (out != nullptr) std::memcpy(out + first, halves, count * sizeof *out);
  }
  return kFinite;
}

}  // namespace

const QuantizeKernels kQuantizeKernels{quantize_row, convert_row};

}  // namespace moebox::MOEBOX_ISA
