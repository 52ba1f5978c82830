#include "isa.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moebox {
namespace {

constexpr std::array<std::string_view, 5> kNames = {"scalar", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

// Whether all these bits of a word are set.
constexpr bool has(unsigned word, std::initializer_list<int> bits) {
  return std::ranges::all_of(bits, [&](int bit) { return word >> bit & 1u; });
}

// XCR0: the register state that the operating system saves (Intel SDM vol. 1, 13.3).
unsigned long saved_state() {
  if (!has(Cpuid(1, 0).ecx, {27})) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long>(high) << 32 | low;
}

// Linux enables the 8 KiB of tile registers for a process only on request
// (Documentation/arch/x86/xstate.rst).
bool request_tiles() {
  constexpr int kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
}

std::vector<Isa> find_usable() {
  std::vector<Isa> found = {Isa::scalar};
  const auto state = saved_state();
  const Cpuid one(1, 0), seven(7, 0), seven_one(7, 1);
  constexpr unsigned long kAvxState = 0x6, kAvx512State = 0xe6, kAmxState = 0x60000;
  if ((state & kAvxState) != kAvxState || !has(one.ecx, {12, 28, 29}) || !has(seven.ebx, {5})) return found;
  found.push_back(Isa::avx2);  // fma, avx, f16c; avx2
  if ((state & kAvx512State) != kAvx512State || !has(seven.ebx, {16, 17, 30, 31})) return found;
  found.push_back(Isa::avx512);  // f, dq, bw, vl
  if (!has(seven_one.eax, {5})) return found;
  found.push_back(Isa::avx512bf16);
  if ((state & kAmxState) != kAmxState || !has(seven.edx, {22, 24})) return found;
  if (request_tiles()) found.push_back(Isa::amx);  // amx-bf16, amx-tile
  return found;
}

#else

std::vector<Isa> find_usable() { return {Isa::scalar}; }

#endif

std::string usable_names() {
  std::string names;
  for (Isa isa : usable_isas()) names.append(names.empty() ? "" : ", ").append(isa_name(isa));
  return names;
}

}  // namespace

std::string_view isa_name(Isa isa) { return kNames[static_cast<std::size_t>(isa)]; }

const std::vector<Isa>& usable_isas() {
  static const std::vector<Isa> isas = [] {
    auto found = find_usable();
    std::ranges::reverse(found);
    return found;
  }();
  return isas;
}

Isa choose_isa(const std::optional<std::string>& name) {
  const auto& usable = usable_isas();
  if (!name) return usable.front();
  const auto found = std::ranges::find(usable, *name, isa_name);
  if (found == usable.end())
    throw std::invalid_argument("isa: '" + *name + "' cannot run here; this machine has " + usable_names());
  return *found;
}

}  // namespace moebox
