// Measures the machine: what it can read and multiply at best, beside which the kernels' figures stand.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace moebox {

struct Probe {
  // Reads n bytes in order; returns something made of all of them, so that no load can be left out.
  std::uint64_t (*read)(const std::uint8_t* at, std::size_t n);
  // Independent multiply-adds in registers, in the unit that the kernels use for many tokens.
  void (*multiply)(std::size_t rounds);
  double flops_per_round;
};

MOEBOX_DECLARE_TABLES(Probe, kProbe)

}  // namespace moebox
