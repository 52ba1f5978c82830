// Which key has which slot, and which key is evicted first. Plain bookkeeping: no bytes, no threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "residency/value_model.h"

namespace moebox {

// Half-life of an expert's score. On traces of a small model of the family 8 to 32 tokens were best.
constexpr double kScoreHalfLifeTokens = 16;

// A tick is a token. A key's score counts its uses and halves every `half_life` ticks:
//   score = sum over uses of count * 2^(-(tick - tick of the use) / half_life).
// Its level is log2(value) + tick / half_life, where the value is the score, or what update_values()
// estimated since. Levels do not change with the tick, so neither does the order of two keys.
//
// A layer's experts can only be used when the layer's turn comes. The key that is evicted first is the one
// with the lowest value divided by the number of layer steps until its layer's turn.
class Residency {
 public:
  // reserve < n_slots, or both 0. n_experts: keys per layer, a divisor of n_keys; 0: all are of one layer.
  Residency(std::size_t n_keys, std::size_t n_slots, std::size_t reserve, double half_life,
            std::size_t n_experts = 0);

  std::size_t n_keys() const { return slot_of_.size(); }
  std::size_t n_slots() const { return key_in_.size(); }
  std::size_t reserve() const { return reserve_; }
  std::size_t n_free() const { return free_.size(); }
  std::size_t n_resident() const { return n_slots() - n_free(); }
  std::size_t n_experts() const { return n_experts_; }
  std::int64_t tick() const { return tick_; }
  void set_tick(std::int64_t tick) { tick_ = tick; }
  const std::vector<std::int32_t>& slots() const { return key_in_; }
  const std::vector<std::int32_t>& table() const { return slot_of_; }
  // The free slots, in no order.
  std::span<const std::int32_t> free() const { return free_; }

  std::int32_t slot(std::int32_t key) const { return slot_of_[key]; }
  // Adds to the key's score. The key's layer is the one being computed.
  void use(std::int32_t key, double count);
  void seed(std::int32_t key, double score);
  double score(std::int32_t key) const;
  // Of equal levels, the higher key's is the weaker.
  bool weaker(std::int32_t a, std::int32_t b) const {
    return level_[a] != level_[b] ? level_[a] < level_[b] : a > b;
  }

  // Has the value model learn from a layer's picks, and replaces the levels of the layer's residents by its
  // estimates. picks: all keys of one layer that the token of this tick picked, after use() of each. Takes
  // long, so call it while the GPU or the drive is busy. Does nothing without n_experts, or where all keys
  // have a slot.
  void update_values(std::span<const std::int32_t> picks);

  // Gives the key the lowest free slot; -1 if none is free. The key must not be resident.
  std::int32_t place(std::int32_t key);
  // Gives the key this slot, which must be free.
  void place(std::int32_t key, std::int32_t slot);
  // Frees the key's slot. The key must be resident.
  void release(std::int32_t key);

  // weakest() leaves out keys that are held. The key must be resident.
  void hold(std::int32_t key, bool held) { held_[slot_of_[key]] = held; }
  bool held(std::int32_t key) const { return held_[slot_of_[key]]; }
  // Up to n resident keys that are not held, weakest first.
  std::vector<std::int32_t> weakest(std::size_t n);
  // Releases the weakest until `reserve` slots are free; returns their keys.
  std::vector<std::int32_t> trim();

 private:
  using Heap = std::vector<std::int32_t>;  // slots in use, that of the weakest key on top

  double age() const { return static_cast<double>(tick_) / half_life_; }
  std::size_t layer_of(std::int32_t key) const { return static_cast<std::size_t>(key) / n_experts_; }
  void fill(std::int32_t key, std::int32_t slot);
  Heap& heap_of(std::int32_t slot) { return heaps_[layer_of(key_in_[slot])]; }
  void set_level(std::int32_t key, double level);
  double rank(std::size_t layer) const;
  Heap* weakest_heap();

  bool slot_weaker(std::int32_t a, std::int32_t b) const { return weaker(key_in_[a], key_in_[b]); }
  void put(Heap& heap, std::size_t at, std::int32_t slot);
  void sift_up(Heap& heap, std::size_t at);
  void sift_down(Heap& heap, std::size_t at);
  void push(std::int32_t slot);
  void remove(std::int32_t slot);

  const std::size_t reserve_, n_experts_;
  const double half_life_;
  std::int64_t tick_ = 0;
  std::size_t layer_ = 0;                       // being computed
  std::vector<double> used_;                    // by key: log2(score) + tick / half_life; -inf: never used
  std::vector<double> level_;                   // by key: log2(value) + tick / half_life
  std::vector<double> wait_;                    // log2(n), by the number n of layer steps until a turn
  std::vector<std::int32_t> slot_of_, key_in_;  // by key, by slot; -1: none
  std::vector<std::int32_t> free_;              // a heap, the lowest on top
  std::vector<Heap> heaps_;                     // by layer
  std::vector<std::uint32_t> at_;               // by slot: its index in its heap
  std::vector<std::uint8_t> held_;              // by slot
  std::unique_ptr<ValueModel> value_model_;
  std::vector<std::int32_t> picks_;
  std::vector<float> recent_;
};

}  // namespace moebox
