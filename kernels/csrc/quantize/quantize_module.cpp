// Python bindings: quantize_int4 and to_bfloat16, and the size of an FP8 block.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>

#include "arrays.h"
#include "module.h"
#include "quantize/quantize.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

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

void check_scale_inv(const Array& scale_inv, const SourceMatrix& source) {
  std::optional<std::size_t> rows, columns;
  check(scale_inv, "scale_inv", {Type::float32}, {{"block rows", rows}, {"block columns", columns}});
  require(*rows == ceil_div(source.rows, kFp8Block) && *columns == source.block_columns(),
          "scale_inv: must be [ceil(rows/128), ceil(columns/128)]");
}

// `weight`: uint8 [rows, row bytes].
SourceMatrix source_matrix(const Array& weight, const std::string& dtype,
                           const std::optional<Array>& scale_inv) {
  std::optional<std::size_t> rows, row_bytes;
  check(weight, "weight", {Type::uint8}, {{"rows", rows}, {"row bytes", row_bytes}});
  SourceMatrix source{elements<std::uint8_t>(weight), parse_type(dtype), nullptr, *rows, 0};
  require(*row_bytes % source.item_bytes() == 0, "weight: row bytes are no multiple of the element");
  source.columns = *row_bytes / source.item_bytes();
  require((source.type == SourceType::fp8) == scale_inv.has_value(),
          "scale_inv: goes with F8_E4M3 and only there");
  if (!scale_inv) return source;
  check_scale_inv(*scale_inv, source);
  source.scale_inv = elements<float>(*scale_inv);
  return source;
}

using Result = std::tuple<std::ptrdiff_t, std::ptrdiff_t, double, double, double>;

Result quantize_int4(const Array& weight, const std::string& dtype, const std::optional<Array>& scale_inv,
                     nb::handle packed_argument, nb::handle scale_argument, int threads,
                     const std::optional<std::string>& isa) {
  const OutArray packed = writable(packed_argument, "packed"), scale = writable(scale_argument, "scale");
  const SourceMatrix source = source_matrix(weight, dtype, scale_inv);
  std::optional<std::size_t> rows = source.rows, columns = source.columns;
  require(source.columns % kGroup == 0, "weight: columns are no multiple of 32");
  check(Array(packed), "packed", {Type::int32}, {{"rows", rows}, {"columns", columns, 8}});
  check(Array(scale), "scale", {Type::bf16}, {{"rows", rows}, {"columns", columns, kGroup}});
  const QuantizeKernels& kernels = MOEBOX_TABLE(kQuantizeKernels, choose_isa(isa));
  const nb::gil_scoped_release unlocked;
  const auto [bad, error] = quantize_matrix(source, elements<std::uint32_t>(packed),
                                            elements<std::uint16_t>(scale), threads, kernels);
  return {bad.row, bad.column, error.sum_sq_error, error.sum_sq, error.max_abs};
}

std::tuple<std::ptrdiff_t, std::ptrdiff_t> to_bfloat16(const Array& weight, const std::string& dtype,
                                                       const std::optional<Array>& scale_inv,
                                                       nb::handle out_argument, int threads,
                                                       const std::optional<std::string>& isa) {
  const SourceMatrix source = source_matrix(weight, dtype, scale_inv);
  std::optional<OutArray> out;
  if (!out_argument.is_none()) {
    out = writable(out_argument, "out");
    std::optional<std::size_t> rows = source.rows, columns = source.columns;
    check(Array(*out), "out", {Type::bf16}, {{"rows", rows}, {"columns", columns}});
  }
  const QuantizeKernels& kernels = MOEBOX_TABLE(kQuantizeKernels, choose_isa(isa));
  const nb::gil_scoped_release unlocked;
  const Position bad =
      convert_matrix(source, out ? elements<std::uint16_t>(*out) : nullptr, threads, kernels);
  return {bad.row, bad.column};
}

}  // namespace

void register_quantize(nb::module_& m) {
  m.attr("FP8_BLOCK") = kFp8Block;
  m.def("quantize_int4", quantize_int4, "weight"_a.noconvert(), "dtype"_a, "scale_inv"_a.noconvert().none(),
        "packed"_a, "scale"_a, "threads"_a, "isa"_a.none());
  m.def("to_bfloat16", to_bfloat16, "weight"_a.noconvert(), "dtype"_a, "scale_inv"_a.noconvert().none(),
        "out"_a.none(), "threads"_a, "isa"_a.none());
}

}  // namespace moebox
