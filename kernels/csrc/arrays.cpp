#include "arrays.h"

#include <algorithm>

namespace moebox {
namespace {

namespace nb = nanobind;

std::string given_name(const nb::dlpack::dtype& type) {
  static constexpr const char* kCodes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const std::string code =
      type.code < std::size(kCodes) ? kCodes[type.code] : "dlpack code " + std::to_string(type.code) + " x ";
  return code + std::to_string(type.bits);
}

std::string given_shape(const Array& array) {
  std::string text;
  for (std::size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return "[" + text + "]";
}

std::string needed_shape(std::span<const Dim> shape) {
  std::string text;
  for (const Dim& dim : shape) {
    text += text.empty() ? "" : ", ";
    text += dim.symbol;
    if (dim.divisor > 1) text += "/" + std::to_string(dim.divisor);
    if (dim.value) text += "=" + std::to_string(*dim.value / dim.divisor);
  }
  return "[" + text + "]";
}

// Whether the array has the shape; if so, sets the symbols that had no value.
bool fits(const Array& array, std::span<const Dim> shape) {
  if (array.ndim() != shape.size()) return false;
  std::size_t i = 0;
  for (const Dim& dim : shape) {
    const std::size_t size = array.shape(i++) * dim.divisor;
    if (dim.value && *dim.value != size) return false;
  }
  i = 0;
  for (const Dim& dim : shape) dim.value = array.shape(i++) * dim.divisor;
  return true;
}

bool contiguous(const Array& array) {
  std::int64_t expected = 1;
  for (std::size_t i = array.ndim(); i-- > 0; expected *= static_cast<std::int64_t>(array.shape(i)))
    if (array.shape(i) > 1 && array.stride(i) != expected) return false;
  return true;
}

void check_form(const Array& array, const char* name, std::span<const Type> types,
                std::span<const Dim> shape) {
  const auto fail = [&](const std::string& what, const std::string& needed) {
    return std::string(name) + ": " + what + " given, " + needed + " needed";
  };
  if (std::ranges::none_of(types, [&](Type type) { return is_type(array.dtype(), type); })) {
    std::string needed;
    for (Type type : types) needed += (needed.empty() ? "" : " or ") + std::string(type_name(type));
    throw nb::type_error(fail("dtype " + given_name(array.dtype()), needed).c_str());
  }
  if (!fits(array, shape)) value_error(fail("shape " + given_shape(array), needed_shape(shape)));
}

void check_contiguous(const Array& array, const char* name) {
  if (!contiguous(array))
    value_error(std::string(name) + ": not contiguous (row-major); pass array.contiguous()");
}

}  // namespace

const char* type_name(Type type) {
  switch (type) {
    case Type::uint8:
      return "uint8";
    case Type::int32:
      return "int32";
    case Type::float32:
      return "float32";
    case Type::bf16:
      return "bfloat16";
  }
  return "?";
}

bool is_type(const nb::dlpack::dtype& given, Type type) {
  using nb::dlpack::dtype_code;
  const auto is = [&](dtype_code code, int bits) {
    return given.code == static_cast<std::uint8_t>(code) && given.bits == bits && given.lanes == 1;
  };
  switch (type) {
    case Type::uint8:
      return is(dtype_code::UInt, 8);
    case Type::int32:
      return is(dtype_code::Int, 32);
    case Type::float32:
      return is(dtype_code::Float, 32);
    case Type::bf16:
      return is(dtype_code::Bfloat, 16) || is(dtype_code::UInt, 16);
  }
  return false;
}

void check(const Array& array, const char* name, std::initializer_list<Type> types,
           std::initializer_list<Dim> shape) {
  check_form(array, name, {types.begin(), types.size()}, {shape.begin(), shape.size()});
  check_memory(array, name);
}

void check(const Array& array, const char* name, Type type, std::span<const Dim> shape) {
  check_form(array, name, {&type, 1}, shape);
  check_contiguous(array, name);
}

void check_memory(const Array& array, const char* name) {
  const int device = array.device_type();
  if (device != nb::device::cpu::value && device != nb::device::cuda_host::value)
    throw nb::type_error(
        (std::string(name) + ": the array is on another device, CPU memory is needed").c_str());
  check_contiguous(array, name);
}

OutArray writable(nb::handle argument, const char* name) {
  OutArray array;
  if (nb::try_cast(argument, array, false)) return array;
  Array read_only;
  const std::string prefix = std::string(name) + ": ";
  if (nb::try_cast(argument, read_only, false))
    value_error(prefix + "read-only array given, a writable one needed");
  throw nb::type_error((prefix + nb::inst_name(argument).c_str() + " given, an array needed").c_str());
}

void value_error(const std::string& message) { throw nb::value_error(message.c_str()); }

}  // namespace moebox
