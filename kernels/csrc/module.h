// Each *_module.cpp has one of these functions, which adds its part to the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace moebox {

void register_cold_reader(nanobind::module_& m);
void register_copiers(nanobind::module_& m);
void register_experts(nanobind::module_& m);
void register_host_step(nanobind::module_& m);
void register_mailbox(nanobind::module_& m);
void register_probes(nanobind::module_& m);
void register_quantize(nanobind::module_& m);
void register_ram_rows(nanobind::module_& m);
void register_reader(nanobind::module_& m);
void register_replay(nanobind::module_& m);
void register_residency(nanobind::module_& m);

}  // namespace moebox
