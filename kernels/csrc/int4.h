// The numbers of the INT4 format that every kernel counts on; quantize/int4.py describes the format.
#pragma once

#include <cstddef>

namespace moebox {

constexpr std::size_t kGroup = 32;               // weights of a row that share a scale
constexpr std::size_t kGroupBytes = kGroup / 2;  // their packed values

}  // namespace moebox
