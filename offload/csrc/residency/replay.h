// How many picks of a routing trace a cache of experts would hit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moebox {

// Experts that a router picked: ids [tokens, layers, top_k], all different within a layer.
struct Trace {
  const std::int32_t* ids;
  std::size_t tokens, layers, top_k, n_experts;
};

// What decides which expert is evicted. decayed: Residency with its value model. score: Residency without
// layers and value model. lru: the oldest last use. lfu: the fewest uses. belady: the latest next use.
enum class Policy { decayed, score, lru, lfu, belady };

// Hits of each token. The cache holds `slots` experts, and the misses of one layer besides. When the next
// layer's picks are looked up, the weakest experts are evicted until `slots` are left, but none of these
// picks. HostStep does the same where every miss is uploaded.
std::vector<std::int32_t> replay(const Trace& trace, std::size_t slots, Policy policy, double half_life);

}  // namespace moebox
