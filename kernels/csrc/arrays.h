// Arrays that a Python caller passes, checked before a kernel sees them. Each error names the argument, what
// was given and what is needed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <optional>
#include <span>
#include <string>

namespace moebox {

// An array that C++ only reads; its memory may be read-only. Any library's array will do. The functions below
// check it rather than nanobind's own annotations, whose only message is the list of signatures.
using Array = nanobind::ndarray<nanobind::ro>;
// An array that C++ writes to. Bindings take the argument as a handle and get this from writable().
using OutArray = nanobind::ndarray<>;

enum class Type { uint8, int32, float32, bf16 };  // bf16: bfloat16, or uint16 that holds its bits

// A dimension of a needed shape. The first array that has the symbol sets its value, to the array's size
// times `divisor`; later arrays must agree.
struct Dim {
  const char* symbol;
  std::optional<std::size_t>& value;
  std::size_t divisor = 1;
};

const char* type_name(Type type);
bool is_type(const nanobind::dlpack::dtype& given, Type type);

// Throws TypeError (dtype, device) or ValueError (shape, strides).
void check(const Array& array, const char* name, std::initializer_list<Type> types,
           std::initializer_list<Dim> shape);
// The same for a shape that is only known at run time, of an array that may lie on any device.
void check(const Array& array, const char* name, Type type, std::span<const Dim> shape);
// The same as the first, of the device and the strides alone: contiguous CPU memory.
void check_memory(const Array& array, const char* name);

// The argument as memory to write to. Throws TypeError where it is no array, ValueError where it is
// read-only.
OutArray writable(nanobind::handle argument, const char* name);

template <class T>
const T* elements(const Array& array) {
  return static_cast<const T*>(array.data());
}
template <class T>
T* elements(const OutArray& array) {
  return static_cast<T*>(array.data());
}

[[noreturn]] void value_error(const std::string& message);

}  // namespace moebox
