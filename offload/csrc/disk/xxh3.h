// XXH3-64 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md) of more than 240 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moebox {

inline constexpr std::size_t kXxh3Least = 241;

// `nbytes` is at least kXxh3Least: XXH3 has other algorithms for less, which no expert needs.
std::uint64_t xxh3_64(const std::byte* data, std::size_t nbytes);

}  // namespace moebox
