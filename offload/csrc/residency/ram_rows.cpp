#include "residency/ram_rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moebox {

RamRows::RamRows(std::span<std::int32_t> table, std::size_t n_rows, std::size_t reserve, double half_life,
                 std::size_t n_experts)
    : table_(table), residency_(table.size(), n_rows, reserve, half_life, n_experts) {
  take_over();
}

void RamRows::take_over() {
  std::vector<std::int32_t> key_in(residency_.n_slots(), -1);
  for (std::size_t key = 0; key < table_.size(); ++key) {
    const std::int32_t row = table_[key];
    if (row < -1 || row >= static_cast<std::int64_t>(key_in.size()) || (row >= 0 && key_in[row] >= 0))
      throw std::invalid_argument(
          "table[" + std::to_string(key) + "]: row " + std::to_string(row) +
          " given, -1 or a row of its own below n_rows=" + std::to_string(key_in.size()) + " needed");
    if (row >= 0) key_in[row] = static_cast<std::int32_t>(key);
  }
  const auto gap = std::ranges::find(key_in, -1);
  if (std::any_of(gap, key_in.end(), [](std::int32_t key) { return key >= 0; }))
    throw std::invalid_argument("table: row " + std::to_string(gap - key_in.begin()) +
                                " is free, and rows behind it are not");
  for (std::size_t key = 0; key < table_.size(); ++key)
    if (residency_.slot(static_cast<std::int32_t>(key)) >= 0)
      residency_.release(static_cast<std::int32_t>(key));
  kept_.clear();
  for (auto key = key_in.begin(); key != gap; ++key) residency_.place(*key);
}

std::int32_t RamRows::place(std::int32_t key) { return residency_.place(key); }

void RamRows::drop(std::int32_t key) {
  table_[key] = -1;
  residency_.release(key);
}

void RamRows::hand_over(std::int32_t from, std::int32_t to) {
  const std::int32_t row = residency_.slot(from);
  drop(from);
  residency_.place(to, row);
}

std::vector<std::int32_t> RamRows::weakest(std::size_t n, std::span<const std::int32_t> busy) {
  std::vector<std::int32_t> newly_held;
  for (const std::int32_t key : busy) {
    if (residency_.slot(key) < 0 || residency_.held(key)) continue;
    residency_.hold(key, true);
    newly_held.push_back(key);
  }
  auto keys = residency_.weakest(n);
  for (const std::int32_t key : newly_held) residency_.hold(key, false);
  return keys;
}

void RamRows::make_room(std::size_t n_free, std::span<const std::int32_t> busy) {
  if (residency_.n_free() >= n_free) return;
  for (const std::int32_t key : weakest(n_free - residency_.n_free(), busy)) drop(key);
}

void RamRows::keep(std::int32_t key) {
  residency_.hold(key, true);
  kept_.push_back(key);
}

void RamRows::release_kept() {
  for (const std::int32_t key : kept_)
    if (residency_.slot(key) >= 0) residency_.hold(key, false);
  kept_.clear();
}

}  // namespace moebox
