#include "residency.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace moebox {

Residency::Residency(std::size_t n_keys, std::size_t n_slots, std::size_t reserve, double half_life)
    : reserve_(reserve),
      half_life_(half_life),
      level_(n_keys, -std::numeric_limits<double>::infinity()),
      slot_of_(n_keys, -1),
      key_in_(n_slots, -1),
      at_(n_slots, 0),
      held_(n_slots, 0) {
  if (reserve >= std::max<std::size_t>(n_slots, 1))
    throw std::invalid_argument("reserve: " + std::to_string(reserve) +
                                " given, fewer than n_slots=" + std::to_string(n_slots) + " needed");
  if (!(half_life > 0) || std::isinf(half_life))
    throw std::invalid_argument("half_life: " + std::to_string(half_life) +
                                " given, a positive number needed");
  for (std::size_t slot = 0; slot < n_slots; ++slot) free_.push_back(static_cast<std::int32_t>(slot));
  heap_.reserve(n_slots);
}

void Residency::use(std::int32_t key, double count) {
  set_level(key, std::log2(std::exp2(level_[key] - age()) + count) + age());
}

void Residency::seed(std::int32_t key, double score) { set_level(key, std::log2(score) + age()); }

double Residency::score(std::int32_t key) const { return std::exp2(level_[key] - age()); }

void Residency::set_level(std::int32_t key, double level) {
  level_[key] = level;
  if (slot_of_[key] < 0) return;
  sift_up(at_[slot_of_[key]]);
  sift_down(at_[slot_of_[key]]);
}

std::int32_t Residency::place(std::int32_t key) {
  if (free_.empty()) return -1;
  std::ranges::pop_heap(free_, std::greater{});
  const std::int32_t slot = free_.back();
  free_.pop_back();
  slot_of_[key] = slot;
  key_in_[slot] = key;
  held_[slot] = 0;
  push(slot);
  return slot;
}

void Residency::release(std::int32_t key) {
  const std::int32_t slot = slot_of_[key];
  remove(slot);
  slot_of_[key] = -1;
  key_in_[slot] = -1;
  free_.push_back(slot);
  std::ranges::push_heap(free_, std::greater{});
}

std::vector<std::int32_t> Residency::weakest(std::size_t n) {
  std::vector<std::int32_t> chosen, taken;
  while (chosen.size() < n && !heap_.empty()) {
    const std::int32_t slot = heap_.front();
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

void Residency::put(std::size_t at, std::int32_t slot) {
  heap_[at] = slot;
  at_[slot] = static_cast<std::uint32_t>(at);
}

void Residency::sift_up(std::size_t at) {
  const std::int32_t slot = heap_[at];
  for (; at > 0 && slot_weaker(slot, heap_[(at - 1) / 2]); at = (at - 1) / 2) put(at, heap_[(at - 1) / 2]);
  put(at, slot);
}

void Residency::sift_down(std::size_t at) {
  const std::int32_t slot = heap_[at];
  for (std::size_t child; (child = 2 * at + 1) < heap_.size(); at = child) {
    if (child + 1 < heap_.size() && slot_weaker(heap_[child + 1], heap_[child])) ++child;
    if (!slot_weaker(heap_[child], slot)) break;
    put(at, heap_[child]);
  }
  put(at, slot);
}

void Residency::push(std::int32_t slot) {
  heap_.push_back(slot);
  put(heap_.size() - 1, slot);
  sift_up(heap_.size() - 1);
}

void Residency::remove(std::int32_t slot) {
  const std::size_t at = at_[slot];
  const std::int32_t last = heap_.back();
  heap_.pop_back();
  if (last == slot) return;
  put(at, last);
  sift_up(at);
  sift_down(at_[last]);
}

}  // namespace moebox
