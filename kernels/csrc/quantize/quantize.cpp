#include "quantize/quantize.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <thread>
#include <vector>

#include "module.h"

namespace nb = nanobind;

namespace moebox {
namespace {

template <class T, int dims>
using Array = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;

struct Position {
  std::ptrdiff_t row = kFinite, column = kFinite;
};

SourceType parse_type(const std::string& name) {
  if (name == "F32") return SourceType::f32;
  if (name == "BF16") return SourceType::bf16;
  if (name == "F16") return SourceType::f16;
  if (name == "F8_E4M3") return SourceType::fp8;
  throw std::invalid_argument("dtype: '" + name + "' is none of F32, BF16, F16, F8_E4M3");
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

SourceMatrix source_matrix(const Array<const std::uint8_t, 2>& weight, const std::string& dtype,
                           const std::optional<Array<const float, 2>>& scale_inv) {
  SourceMatrix source{weight.data(), parse_type(dtype), nullptr, weight.shape(0), 0};
  require(weight.shape(1) % source.item_bytes() == 0, "weight: row bytes are no multiple of the element");
  source.columns = weight.shape(1) / source.item_bytes();
  require((source.type == SourceType::fp8) == scale_inv.has_value(),
          "scale_inv: goes with F8_E4M3 and only there");
  if (!scale_inv) return source;
  require(scale_inv->shape(0) == (source.rows + kFp8Block - 1) / kFp8Block &&
              scale_inv->shape(1) == source.block_columns(),
          "scale_inv: must be [ceil(rows/128), ceil(columns/128)]");
  source.scale_inv = scale_inv->data();
  return source;
}

// A factor that no trained block has makes its block's first weight the bad one.
Position find_bad_factor(const SourceMatrix& source) {
  if (source.scale_inv == nullptr) return {};
  const std::size_t blocks = source.block_columns(),
                    count = (source.rows + kFp8Block - 1) / kFp8Block * blocks;
  const auto* bad = std::find_if(source.scale_inv, source.scale_inv + count,
                                 [](float factor) { return !(std::fabs(factor) < 0x1p60f); });
  if (bad == source.scale_inv + count) return {};
  const std::size_t index = bad - source.scale_inv;
  return {static_cast<std::ptrdiff_t>(index / blocks * kFp8Block),
          static_cast<std::ptrdiff_t>(index % blocks * kFp8Block)};
}

// Calls row_kernel(row), which returns kFinite or a bad column, for all rows; returns the first bad position.
template <class RowKernel>
Position for_rows(std::size_t rows, int threads, const RowKernel& row_kernel) {
  const std::size_t parts = std::clamp<std::size_t>(rows / 16, 1, std::max(threads, 1));
  std::vector<Position> bad(parts);
  const auto work = [&](std::size_t part) {
    for (std::size_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
      const std::ptrdiff_t column = row_kernel(row);
      if (column == kFinite) continue;
      bad[part] = {static_cast<std::ptrdiff_t>(row), column};
      return;
    }
  };
  std::vector<std::jthread> helpers;
  for (std::size_t part = 1; part < parts; part++) helpers.emplace_back(work, part);
  work(0);
  helpers.clear();
  const auto first = std::ranges::find_if(bad, [](const Position& p) { return p.row != kFinite; });
  return first == bad.end() ? Position{} : *first;
}

using QuantizeResult = std::tuple<std::ptrdiff_t, std::ptrdiff_t, double, double, double>;

QuantizeResult quantize_int4(const Array<const std::uint8_t, 2>& weight, const std::string& dtype,
                             const std::optional<Array<const float, 2>>& scale_inv,
                             const Array<std::int32_t, 2>& packed, const Array<std::uint16_t, 2>& scale,
                             int threads, const std::optional<std::string>& isa) {
  const SourceMatrix source = source_matrix(weight, dtype, scale_inv);
  const std::size_t rows = source.rows, columns = source.columns;
  require(columns % kGroup == 0, "weight: columns are no multiple of 32");
  require(packed.shape(0) == rows && packed.shape(1) == columns / 8, "packed: must be [rows, columns/8]");
  require(scale.shape(0) == rows && scale.shape(1) == columns / kGroup, "scale: must be [rows, columns/32]");
  const auto& kernels = MOEBOX_TABLE(kQuantizeKernels, choose_isa(isa));
  auto* words = reinterpret_cast<std::uint32_t*>(packed.data());
  std::uint16_t* scales = scale.data();

  const nb::gil_scoped_release unlocked;
  Position bad = find_bad_factor(source);
  if (bad.row != kFinite) return {bad.row, bad.column, 0, 0, 0};
  std::vector<RowError> errors(rows);
  bad = for_rows(rows, threads, [&](std::size_t row) {
    return kernels.quantize_row(source, row, words + row * (columns / 8), scales + row * (columns / kGroup),
                                errors[row]);
  });
  RowError total;
  for (const RowError& error : errors) {
    total.sum_sq_error += error.sum_sq_error;
    total.sum_sq += error.sum_sq;
    total.max_abs = std::max(total.max_abs, error.max_abs);
  }
  return {bad.row, bad.column, total.sum_sq_error, total.sum_sq, total.max_abs};
}

std::tuple<std::ptrdiff_t, std::ptrdiff_t> to_bfloat16(const Array<const std::uint8_t, 2>& weight,
                                                       const std::string& dtype,
                                                       const std::optional<Array<const float, 2>>& scale_inv,
                                                       const std::optional<Array<std::uint16_t, 2>>& out,
                                                       int threads, const std::optional<std::string>& isa) {
  const SourceMatrix source = source_matrix(weight, dtype, scale_inv);
  require(!out || (out->shape(0) == source.rows && out->shape(1) == source.columns),
          "out: must be [rows, columns]");
  const auto& kernels = MOEBOX_TABLE(kQuantizeKernels, choose_isa(isa));
  std::uint16_t* values = out ? out->data() : nullptr;

  const nb::gil_scoped_release unlocked;
  Position bad = find_bad_factor(source);
  if (bad.row == kFinite) {
    bad = for_rows(source.rows, threads, [&](std::size_t row) {
      return kernels.convert_row(source, row, values == nullptr ? nullptr : values + row * source.columns);
    });
  }
  return {bad.row, bad.column};
}

}  // namespace

void register_quantize(nb::module_& m) {
  m.def("quantize_int4", quantize_int4, nb::arg("weight").noconvert(), nb::arg("dtype"),
        nb::arg("scale_inv").noconvert().none(), nb::arg("packed").noconvert(), nb::arg("scale").noconvert(),
        nb::arg("threads"), nb::arg("isa").none());
  m.def("to_bfloat16", to_bfloat16, nb::arg("weight").noconvert(), nb::arg("dtype"),
        nb::arg("scale_inv").noconvert().none(), nb::arg("out").noconvert().none(), nb::arg("threads"),
        nb::arg("isa").none());
}

}  // namespace moebox
