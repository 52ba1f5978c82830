// Measures how fast the machine can read and multiply at best, to compare the kernels with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace moebox {

struct Probe {
  // Reads n bytes in order. The result depends on all of them, so the compiler cannot leave out a load.
  std::uint64_t (*read)(const std::uint8_t* at, std::size_t n);
  // Does independent multiply-adds in registers, in the unit that the kernels use for many tokens.
  void (*multiply)(std::size_t rounds);
  double flops_per_round;
};

MOEBOX_DECLARE_TABLES(Probe, kProbe)

}  // namespace moebox
