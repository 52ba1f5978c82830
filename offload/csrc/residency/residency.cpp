#include "residency/residency.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace moebox {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();
// Estimates below this are noise: they count as this, since a level is a logarithm.
constexpr float kLeastValue = 1e-4f;

}  // namespace

Residency::Residency(std::size_t n_keys, std::size_t n_slots, std::size_t reserve, double half_life,
                     std::size_t n_experts)
    : reserve_(reserve),
      n_experts_(n_experts ? n_experts : std::max<std::size_t>(n_keys, 1)),
      half_life_(half_life),
      used_(n_keys, kNever),
      level_(n_keys, kNever),
      slot_of_(n_keys, -1),
      key_in_(n_slots, -1),
      heaps_(n_keys / n_experts_),
      at_(n_slots, 0),
      held_(n_slots, 0) {
  if (reserve >= std::max<std::size_t>(n_slots, 1))
    throw std::invalid_argument("reserve: " + std::to_string(reserve) +
                                " given, fewer than n_slots=" + std::to_string(n_slots) + " needed");
  if (!(half_life > 0) || std::isinf(half_life))
    throw std::invalid_argument("half_life: " + std::to_string(half_life) +
                                " given, a positive number needed");
  if (n_keys % n_experts_)
    throw std::invalid_argument("n_experts: " + std::to_string(n_experts) +
                                " given, a divisor of n_keys=" + std::to_string(n_keys) + " needed");
  for (std::size_t slot = 0; slot < n_slots; ++slot) free_.push_back(static_cast<std::int32_t>(slot));
  for (std::size_t layers = 0; layers <= heaps_.size(); ++layers)
    wait_.push_back(std::log2(static_cast<double>(layers)));
}

void Residency::use(std::int32_t key, double count) {
  layer_ = layer_of(key);
  used_[key] = std::log2(std::exp2(used_[key] - age()) + count) + age();
  set_level(key, used_[key]);
}

void Residency::seed(std::int32_t key, double score) {
  used_[key] = std::log2(score) + age();
  set_level(key, used_[key]);
}

double Residency::score(std::int32_t key) const { return std::exp2(used_[key] - age()); }

void Residency::update_values(std::span<const std::int32_t> picks) {
  if (heaps_.size() < 2 || n_slots() - reserve_ >= n_keys() || n_slots() == 0 || picks.empty()) return;
  if (!value_model_) value_model_ = std::make_unique<ValueModel>(heaps_.size(), n_experts_);
  layer_ = layer_of(picks.front());
  const auto first = static_cast<std::int32_t>(layer_ * n_experts_);
  picks_.assign(picks.begin(), picks.end());
  for (std::int32_t& pick : picks_) pick -= first;
  // An expert used at a share p of all tokens has a score of p / (1 - 2^(-1 / half_life)) in the mean.
  const double share = 1 - std::exp2(-1 / half_life_);
  recent_.resize(n_experts_);
  for (std::size_t i = 0; i < n_experts_; ++i)
    recent_[i] = static_cast<float>(share) * std::exp2(static_cast<float>(used_[first + i] - age()));
  const auto values = value_model_->step(layer_, tick_, picks_, recent_);
  const double scale = age() - std::log2(share);
  for (std::size_t i = 0; i < n_experts_; ++i)
    if (slot_of_[first + i] >= 0)
      set_level(first + static_cast<std::int32_t>(i), std::log2(std::max(values[i], kLeastValue)) + scale);
}

void Residency::set_level(std::int32_t key, double level) {
  level_[key] = level;
  const std::int32_t slot = slot_of_[key];
  if (slot < 0) return;
  sift_up(heap_of(slot), at_[slot]);
  sift_down(heap_of(slot), at_[slot]);
}

std::int32_t Residency::place(std::int32_t key) {
  if (free_.empty()) return -1;
  std::ranges::pop_heap(free_, std::greater{});
  const std::int32_t slot = free_.back();
  free_.pop_back();
  fill(key, slot);
  return slot;
}

void Residency::place(std::int32_t key, std::int32_t slot) {
  free_.erase(std::ranges::find(free_, slot));
  std::ranges::make_heap(free_, std::greater{});
  fill(key, slot);
}

void Residency::fill(std::int32_t key, std::int32_t slot) {
  slot_of_[key] = slot;
  key_in_[slot] = key;
  held_[slot] = 0;
  push(slot);
}

void Residency::release(std::int32_t key) {
  const std::int32_t slot = slot_of_[key];
  remove(slot);
  slot_of_[key] = -1;
  key_in_[slot] = -1;
  level_[key] = used_[key];
  free_.push_back(slot);
  std::ranges::push_heap(free_, std::greater{});
}

std::vector<std::int32_t> Residency::weakest(std::size_t n) {
  std::vector<std::int32_t> chosen, taken;
  while (chosen.size() < n) {
    const Heap* heap = weakest_heap();
    if (!heap) break;
    const std::int32_t slot = heap->front();
    remove(slot);
    taken.push_back(slot);
    if (!held_[slot]) chosen.push_back(key_in_[slot]);
  }
  for (std::int32_t slot : taken) push(slot);
  return chosen;
}

std::vector<std::int32_t> Residency::trim() {
  if (n_free() >= reserve_) return {};
  auto keys = weakest(reserve_ - n_free());
  for (std::int32_t key : keys) release(key);
  return keys;
}

// log2(value / layer steps until the layer's turn), up to the same constant for all layers, of the layer's
// weakest key. The layer being computed has its next turn one token later, since its picks are known.
double Residency::rank(std::size_t layer) const {
  const std::size_t wait = layer > layer_ ? layer - layer_ : layer + heaps_.size() - layer_;
  return level_[key_in_[heaps_[layer].front()]] - wait_[wait];
}

Residency::Heap* Residency::weakest_heap() {
  Heap* weakest = nullptr;
  double least = 0;
  for (std::size_t layer = 0; layer < heaps_.size(); ++layer) {
    if (heaps_[layer].empty()) continue;
    const double level = rank(layer);
    if (weakest && level > least) continue;
    weakest = &heaps_[layer];  // of equal ranks the last: the higher key
    least = level;
  }
  return weakest;
}

void Residency::put(Heap& heap, std::size_t at, std::int32_t slot) {
  heap[at] = slot;
  at_[slot] = static_cast<std::uint32_t>(at);
}

void Residency::sift_up(Heap& heap, std::size_t at) {
  const std::int32_t slot = heap[at];
  for (; at > 0 && slot_weaker(slot, heap[(at - 1) / 2]); at = (at - 1) / 2)
    put(heap, at, heap[(at - 1) / 2]);
  put(heap, at, slot);
}

void Residency::sift_down(Heap& heap, std::size_t at) {
  const std::int32_t slot = heap[at];
  for (std::size_t child; (child = 2 * at + 1) < heap.size(); at = child) {
    if (child + 1 < heap.size() && slot_weaker(heap[child + 1], heap[child])) ++child;
    if (!slot_weaker(heap[child], slot)) break;
    put(heap, at, heap[child]);
  }
  put(heap, at, slot);
}

void Residency::push(std::int32_t slot) {
  Heap& heap = heap_of(slot);
  heap.push_back(slot);
  put(heap, heap.size() - 1, slot);
  sift_up(heap, heap.size() - 1);
}

void Residency::remove(std::int32_t slot) {
  Heap& heap = heap_of(slot);
  const std::size_t at = at_[slot];
  const std::int32_t last = heap.back();
  heap.pop_back();
  if (last == slot) return;
  put(heap, at, last);
  sift_up(heap, at);
  sift_down(heap, at_[last]);
}

}  // namespace moebox
