// Instruction sets the kernels are compiled for, and which of them this machine can run.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moebox {

// Each set includes those before it.
enum class Isa { scalar, avx2, avx512, avx512bf16, amx };

std::string_view isa_name(Isa isa);

// The sets that are compiled in and that this CPU and its operating system can run, best first. The first
// call asks Linux for AMX's tile registers.
const std::vector<Isa>& usable_isas();

// The named set, or the best one for nullopt; std::invalid_argument if the set is unknown or cannot run here.
Isa choose_isa(const std::optional<std::string>& name);

}  // namespace moebox

// There is one table of kernels per instruction set: `MOEBOX_DECLARE_TABLES(ExpertKernels, kExpertKernels)`
// declares moebox::scalar::kExpertKernels and so on, and `MOEBOX_TABLE(kExpertKernels, isa)` picks one at run
// time.
#if defined(__x86_64__)
#define MOEBOX_DECLARE_TABLES(Type, name) \
  namespace scalar {                      \
  extern const Type name;                 \
  }                                       \
  namespace avx2 {                        \
  extern const Type name;                 \
  }                                       \
  namespace avx512 {                      \
  extern const Type name;                 \
  }                                       \
  namespace avx512bf16 {                  \
  extern const Type name;                 \
  }                                       \
  namespace amx {                         \
  extern const Type name;                 \
  }
#define MOEBOX_TABLE(name, isa)                                                         \
  (*std::array{&::moebox::scalar::name, &::moebox::avx2::name, &::moebox::avx512::name, \
               &::moebox::avx512bf16::name, &::moebox::amx::name}[static_cast<std::size_t>(isa)])
#else
#define MOEBOX_DECLARE_TABLES(Type, name) \
  namespace scalar {                      \
  extern const Type name;                 \
  }
#define MOEBOX_TABLE(name, isa) (static_cast<void>(isa), ::moebox::scalar::name)
#endif
