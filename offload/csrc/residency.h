// Which keys are in which slot, and how much each is used. Plain bookkeeping: no bytes, no threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moebox {

// A key's score halves every `half_life` ticks. It is kept as the logarithm of what it would have been at
// tick 0, so that the order of two scores does not change with time and nothing is touched by a tick.
class Residency {
 public:
  // reserve < n_slots, or both 0.
  Residency(std::size_t n_keys, std::size_t n_slots, std::size_t reserve, double half_life);

  std::size_t n_keys() const { return slot_of_.size(); }
  std::size_t n_slots() const { return key_in_.size(); }
  std::size_t reserve() const { return reserve_; }
  std::size_t n_free() const { return free_.size(); }
  std::size_t n_resident() const { return heap_.size(); }
  std::int64_t tick() const { return tick_; }
  void set_tick(std::int64_t tick) { tick_ = tick; }
  const std::vector<std::int32_t>& slots() const { return key_in_; }
  const std::vector<std::int32_t>& table() const { return slot_of_; }

  std::int32_t slot(std::int32_t key) const { return slot_of_[key]; }
  void use(std::int32_t key, double count);
  void seed(std::int32_t key, double score);
  double score(std::int32_t key) const;
  // Of equal scores, the higher key's is the weaker.
  bool weaker(std::int32_t a, std::int32_t b) const {
    return level_[a] != level_[b] ? level_[a] < level_[b] : a > b;
  }

  // The key gets the lowest free slot; -1 if there is none. It must not be resident.
  std::int32_t place(std::int32_t key);
  // The key must be resident.
  void release(std::int32_t key);

  // A held key is resident and no candidate for eviction.
  void hold(std::int32_t key, bool held) { held_[slot_of_[key]] = held; }
  // Up to n resident keys that are not held, weakest first.
  std::vector<std::int32_t> weakest(std::size_t n);
  // Releases the weakest until `reserve` slots are free; returns their keys.
  std::vector<std::int32_t> trim();

 private:
  double age() const { return static_cast<double>(tick_) / half_life_; }
  void set_level(std::int32_t key, double level);

  bool slot_weaker(std::int32_t a, std::int32_t b) const { return weaker(key_in_[a], key_in_[b]); }
  void put(std::size_t at, std::int32_t slot);
  void sift_up(std::size_t at);
  void sift_down(std::size_t at);
  void push(std::int32_t slot);
  void remove(std::int32_t slot);

  const std::size_t reserve_;
  const double half_life_;
  std::int64_t tick_ = 0;
  std::vector<double> level_;                   // by key: log2(score) + tick / half_life; -inf: never used
  std::vector<std::int32_t> slot_of_, key_in_;  // by key, by slot; -1: none
  std::vector<std::int32_t> free_;              // a heap, the lowest on top
  std::vector<std::int32_t> heap_;              // slots in use, the weakest on top
  std::vector<std::uint32_t> at_;               // by slot: its place in heap_
  std::vector<std::uint8_t> held_;              // by slot
};

}  // namespace moebox
