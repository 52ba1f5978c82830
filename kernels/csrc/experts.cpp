#include "experts.h"

#include <array>

#include "module.h"
namespace moebox {
void register_experts(nanobind::module_& m) {
  m.def("kernel_name", [](int i) { return MOEBOX_TABLE(kExpertKernels, i).name; });
}
}  // namespace moebox
