// INT4 quantization and conversion to bf16 of a checkpoint's matrices, row by row with one table of kernels
// for each instruction set. quantize/int4.py describes the format.
#pragma once

#include <cstddef>
#include <cstdint>

#include "int4.h"
#include "isa.h"
#include "sizes.h"

namespace moebox {

constexpr std::size_t kFp8Block = 128;  // rows and columns that share an FP8 scale

enum class SourceType { f32, bf16, f16, fp8 };

// A row-major matrix as a checkpoint stores it; fp8 (e4m3) has scale_inv [ceil(rows/128), ceil(columns/128)].
struct SourceMatrix {
  const std::uint8_t* data;
  SourceType type;
  const float* scale_inv;
  std::size_t rows, columns;

  // Always inlined, for the reason that sizes.h gives.
  [[gnu::always_inline]] std::size_t item_bytes() const {
    return type == SourceType::f32 ? 4 : type == SourceType::fp8 ? 1 : 2;
  }
  [[gnu::always_inline]] std::size_t block_columns() const { return ceil_div(columns, kFp8Block); }
};

struct RowError {
  double sum_sq_error = 0, sum_sq = 0;
  float max_abs = 0;
};

constexpr std::ptrdiff_t kFinite = -1;

// Every table computes the same bits: lanes hold different groups or fixed columns, sums are exact integers
// or run in a fixed order, and no product is contracted into an fma.
struct QuantizeKernels {
  // packed [columns/8], scale bf16 [columns/32]; columns must be a multiple of 32. Returns kFinite or the
  // first column whose weight is NaN, Inf or at least 2^60; the outputs are then unfinished.
  std::ptrdiff_t (*quantize_row)(const SourceMatrix& source, std::size_t row, std::uint32_t* packed,
                                 std::uint16_t* scale, RowError& error);
  // out bf16 [columns], or null to check only. Returns kFinite or the first column that bf16 cannot hold.
  std::ptrdiff_t (*convert_row)(const SourceMatrix& source, std::size_t row, std::uint16_t* out);
};

MOEBOX_DECLARE_TABLES(QuantizeKernels, kQuantizeKernels)

// A weight that cannot be quantized or converted, or kFinite twice where there is none.
struct Position {
  std::ptrdiff_t row = kFinite, column = kFinite;
  bool finite() const { return row == kFinite; }
};

struct Quantized {
  Position bad;
  RowError error;  // of the whole matrix
};

// packed [rows, columns/8], scale bf16 [rows, columns/32]. The result is the same for any number of threads.
Quantized quantize_matrix(const SourceMatrix& source, std::uint32_t* packed, std::uint16_t* scale,
                          int threads, const QuantizeKernels& kernels);

// out bf16 [rows, columns], or null to check only.
Position convert_matrix(const SourceMatrix& source, std::uint16_t* out, int threads,
                        const QuantizeKernels& kernels);

}  // namespace moebox
