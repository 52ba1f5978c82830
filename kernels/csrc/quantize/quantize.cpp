// Quantizes and converts whole matrices: threads share the rows out.
#include "quantize/quantize.h"

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

namespace moebox {
namespace {

constexpr float kScaleLimit = 0x1p60f;     // a trained block has a smaller scale
constexpr std::size_t kRowsOfThread = 16;  // at least: a thread with fewer costs more than it saves

// The first weight of the first block whose scale is NaN, Inf or too large.
Position find_bad_scale(const SourceMatrix& source) {
  if (source.scale_inv == nullptr) return {};
  const std::size_t blocks = source.block_columns(), count = ceil_div(source.rows, kFp8Block) * blocks;
  const auto* bad = std::find_if(source.scale_inv, source.scale_inv + count,
                                 [](float scale) { return !(std::fabs(scale) < kScaleLimit); });
  if (bad == source.scale_inv + count) return {};
  const std::size_t index = bad - source.scale_inv;
  return {static_cast<std::ptrdiff_t>(index / blocks * kFp8Block),
          static_cast<std::ptrdiff_t>(index % blocks * kFp8Block)};
}

// Calls row_kernel(row) for all rows; it returns kFinite or a bad column. Returns the first bad position.
template <class RowKernel>
Position for_rows(std::size_t rows, int threads, const RowKernel& row_kernel) {
  const std::size_t sharers = std::clamp<std::size_t>(rows / kRowsOfThread, 1, std::max(threads, 1));
  std::vector<Position> bad(sharers);
  const auto work = [&](std::size_t sharer) {
    for (std::size_t row = rows * sharer / sharers; row < rows * (sharer + 1) / sharers; row++) {
      const std::ptrdiff_t column = row_kernel(row);
      if (column == kFinite) continue;
      bad[sharer] = {static_cast<std::ptrdiff_t>(row), column};
      return;
    }
  };
  std::vector<std::jthread> helpers;
  for (std::size_t sharer = 1; sharer < sharers; sharer++) helpers.emplace_back(work, sharer);
  work(0);
  helpers.clear();
  const auto first = std::ranges::find_if(bad, [](const Position& p) { return !p.finite(); });
  return first == bad.end() ? Position{} : *first;
}

}  // namespace

Quantized quantize_matrix(const SourceMatrix& source, std::uint32_t* packed, std::uint16_t* scale,
                          int threads, const QuantizeKernels& kernels) {
  const Position bad_scale = find_bad_scale(source);
  if (!bad_scale.finite()) return {bad_scale, {}};
  const std::size_t words = source.columns / 8, groups = source.columns / kGroup;
  std::vector<RowError> errors(source.rows);
  const Position bad = for_rows(source.rows, threads, [&](std::size_t row) {
    return kernels.quantize_row(source, row, packed + row * words, scale + row * groups, errors[row]);
  });
  RowError total;
  for (const RowError& error : errors) {
    total.sum_sq_error += error.sum_sq_error;
    total.sum_sq += error.sum_sq;
    total.max_abs = std::max(total.max_abs, error.max_abs);
  }
  return {bad, total};
}

Position convert_matrix(const SourceMatrix& source, std::uint16_t* out, int threads,
                        const QuantizeKernels& kernels) {
  const Position bad_scale = find_bad_scale(source);
  if (!bad_scale.finite()) return bad_scale;
  return for_rows(source.rows, threads, [&](std::size_t row) {
    return kernels.convert_row(source, row, out == nullptr ? nullptr : out + row * source.columns);
  });
}

}  // namespace moebox
