#include "experts.h"
namespace moebox::MOEBOX_ISA {
#define STR_(x) #x
#define STR(x) STR_(x)
const ExpertKernels kExpertKernels{STR(MOEBOX_ISA)};
}  // namespace moebox::MOEBOX_ISA
