// What share of a routing trace's picks a cache of experts would hit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moebox {

// Experts that a router picked: ids [tokens, layers, top_k], different ones within a layer.
struct Trace {
  const std::int32_t* ids;
  std::size_t tokens, layers, top_k, n_experts;
};

// decayed: Residency, foreseeing. score: Residency without layers. lru, lfu, belady: by last use, by number
// of uses, by next use.
enum class Policy { decayed, score, lru, lfu, belady };

// Hits of each token. The cache holds `slots` experts, and the misses of one layer besides until the next
// layer's picks are looked up: then the weakest go, but none of those. So it is in DecodeRoads where every
// miss is uploaded.
std::vector<std::int32_t> replay(const Trace& trace, std::size_t slots, Policy policy, double half_life);

}  // namespace moebox
