#include "residency/replay.h"

#include <algorithm>
#include <limits>
#include <set>
#include <span>
#include <utility>

#include "residency/residency.h"

namespace moebox {
namespace {

using Keys = std::span<const std::int32_t>;

class Tier {
 public:
  Tier(const Trace& trace, std::size_t slots, double half_life, bool layered)
      : residency_(trace.layers * trace.n_experts, slots + trace.top_k, trace.top_k, half_life,
                   layered ? trace.n_experts : 0) {}

  std::int32_t step(std::size_t token, std::size_t /*layer*/, Keys keys) {
    residency_.set_tick(static_cast<std::int64_t>(token) + 1);
    hits_.clear();
    for (const std::int32_t key : keys) {
      residency_.use(key, 1);
      if (residency_.slot(key) >= 0) hits_.push_back(key);
    }
    for (const std::int32_t key : hits_) residency_.hold(key, true);
    residency_.trim();
    for (const std::int32_t key : hits_) residency_.hold(key, false);
    for (const std::int32_t key : keys)
      if (residency_.slot(key) < 0) residency_.place(key);
    residency_.update_values(keys);
    return static_cast<std::int32_t>(hits_.size());
  }

 private:
  Residency residency_;
  std::vector<std::int32_t> hits_;
};

// Keeps residents in order of a level that changes only when an expert is picked.
class Ranked {
 public:
  Ranked(const Trace& trace, std::size_t slots, Policy policy)
      : slots_(slots), layers_(trace.layers), policy_(policy), level_(trace.layers * trace.n_experts, 0) {
    if (policy == Policy::belady) find_next_uses(trace);
  }

  std::int32_t step(std::size_t token, std::size_t layer, Keys keys) {
    std::vector<std::int32_t> hits;
    for (const std::int32_t key : keys)
      if (order_.erase({level_[key], -key})) hits.push_back(key);
    const std::size_t others = slots_ - std::min(slots_, hits.size());
    while (order_.size() > others) order_.erase(order_.begin());
    for (std::size_t i = 0; i < keys.size(); ++i) {
      level_[keys[i]] = level(token * layers_ + layer, i, keys);
      order_.insert({level_[keys[i]], -keys[i]});
    }
    return static_cast<std::int32_t>(hits.size());
  }

 private:
  double level(std::size_t step, std::size_t i, Keys keys) const {
    if (policy_ == Policy::lfu) return level_[keys[i]] + 1;
    return policy_ == Policy::lru ? static_cast<double>(step) : -next_uses_[step * keys.size() + i];
  }

  void find_next_uses(const Trace& trace) {
    std::vector<double> next(level_.size(), std::numeric_limits<double>::infinity());
    next_uses_.resize(trace.tokens * trace.layers * trace.top_k);
    for (std::size_t i = next_uses_.size(); i-- > 0;) {
      const std::size_t step = i / trace.top_k;
      double& key = next[step % trace.layers * trace.n_experts + trace.ids[i]];
      next_uses_[i] = key;
      key = static_cast<double>(step);
    }
  }

  const std::size_t slots_, layers_;
  const Policy policy_;
  std::vector<double> level_;                        // by key
  std::set<std::pair<double, std::int32_t>> order_;  // of residents: level, -key
  std::vector<double> next_uses_;                    // by pick: the step that picks the key again
};

template <class Cache>
std::vector<std::int32_t> run(const Trace& trace, Cache cache) {
  std::vector<std::int32_t> hits(trace.tokens), keys(trace.top_k);
  const std::int32_t* ids = trace.ids;
  for (std::size_t token = 0; token < trace.tokens; ++token) {
    for (std::size_t layer = 0; layer < trace.layers; ++layer, ids += trace.top_k) {
      const auto first = static_cast<std::int32_t>(layer * trace.n_experts);
      std::transform(ids, ids + trace.top_k, keys.begin(), [first](std::int32_t id) { return first + id; });
      hits[token] += cache.step(token, layer, keys);
    }
  }
  return hits;
}

}  // namespace

std::vector<std::int32_t> replay(const Trace& trace, std::size_t slots, Policy policy, double half_life) {
  if (policy == Policy::decayed || policy == Policy::score)
    return run(trace, Tier(trace, slots, half_life, policy == Policy::decayed));
  return run(trace, Ranked(trace, slots, policy));
}

}  // namespace moebox
