#pragma once
#include <cstddef>

#include "isa.h"
namespace moebox {
struct ExpertKernels {
  const char* name;
};
MOEBOX_DECLARE_TABLES(ExpertKernels, kExpertKernels)
}  // namespace moebox
