// Each *_module.cpp has one of these functions, which adds its part to the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace moebox {

void register_experts(nanobind::module_& m);
void register_probes(nanobind::module_& m);
void register_quantize(nanobind::module_& m);
void register_reader(nanobind::module_& m);
void register_replay(nanobind::module_& m);
void register_roads(nanobind::module_& m);

}  // namespace moebox
