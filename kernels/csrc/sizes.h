// Rounding of sizes.
//
// These functions are always inlined. Sources that are compiled once per instruction set use them, too; of a
// function that is not inlined the linker keeps one copy, which could be the one with AVX-512 instructions.
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
