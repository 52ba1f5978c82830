// AMX's tile registers, as the expert kernels and the probe use them.
//
// All of it is in an anonymous namespace of the instruction set's own namespace, for the reason that
// experts/math_isa.h gives.
#pragma once

#if MOEBOX_ISA_AMX

#include <immintrin.h>

#include <cstdint>

namespace moebox::MOEBOX_ISA {
namespace {

// The compiler's tile intrinsics do not say that they read and write memory.
inline void tile_memory_fence() { __asm__ volatile("" ::: "memory"); }

// Makes each of the eight tiles 16 rows of 64 bytes. _tile_release() ends their use.
inline void configure_tiles() {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  tile_memory_fence();
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace moebox::MOEBOX_ISA

#endif
