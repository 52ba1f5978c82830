// Rounding of sizes. Inlined always: code compiled for one instruction set must not become the linker's
// choice for all.
#pragma once

#include <cstddef>

namespace moebox {

constexpr std::size_t kCacheLine = 64;  // bytes

[[gnu::always_inline]] constexpr std::size_t ceil_div(std::size_t value, std::size_t by) {
  return (value + by - 1) / by;
}

[[gnu::always_inline]] constexpr std::size_t round_up(std::size_t value, std::size_t to) {
  return ceil_div(value, to) * to;
}

}  // namespace moebox
