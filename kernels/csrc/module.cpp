// The extension module moebox._kernels; src/moebox/_kernels.pyi describes it.
#include "module.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"

NB_MODULE(_kernels, m) {
  m.def("isa_paths", [] {
    std::vector<std::string> names;
    for (moebox::Isa isa : moebox::usable_isas()) names.emplace_back(moebox::isa_name(isa));
    return names;
  });
  moebox::register_experts(m);
  moebox::register_probes(m);
  moebox::register_quantize(m);
  moebox::register_reader(m);
  moebox::register_replay(m);
  moebox::register_residency(m);
  moebox::register_copiers(m);
  moebox::register_ram_rows(m);
  moebox::register_cold_reader(m);
  moebox::register_mailbox(m);
  moebox::register_host_step(m);
}
