// What a Python caller hands over, checked before a kernel sees it: each error names the argument, what was
// given and what is needed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace moebox {

// Any array of any library, read-only ones too. Checked by the functions below rather than by nanobind's
// own annotations, whose only message is the list of signatures.
using Array = nanobind::ndarray<nanobind::ro>;
using OutArray = nanobind::ndarray<>;

enum class Type { uint8, int32, float32, bf16 };  // bf16: bfloat16, or uint16 holding its bits

// A dimension of an expected shape: bound by the first array that has it, compared in later ones.
// The array's size times `divisor` is the symbol's value.
struct Dim {
  const char* symbol;
  std::optional<std::size_t>& value;
  std::size_t divisor = 1;
};

bool is_type(const nanobind::dlpack::dtype& given, Type type);

// Throw TypeError (dtype, device) or ValueError (shape, strides).
void check(const Array& array, const char* name, std::initializer_list<Type> types,
           std::initializer_list<Dim> shape);
// Only that it is contiguous CPU memory.
void check_memory(const Array& array, const char* name);

}  // namespace moebox
