// Checks of keys, for the bindings of Residency and of RamRows.
#pragma once

#include <cstdint>
#include <string>

#include "arrays.h"
#include "residency/residency.h"

namespace moebox {

// Throws ValueError if the key is out of range.
inline std::int32_t checked(const Residency& residency, std::int64_t key) {
  if (key < 0 || static_cast<std::size_t>(key) >= residency.n_keys())
    value_error("key: " + std::to_string(key) + " given, 0 to n_keys=" + std::to_string(residency.n_keys()) +
                " - 1 needed");
  return static_cast<std::int32_t>(key);
}

}  // namespace moebox
