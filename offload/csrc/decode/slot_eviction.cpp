#include "decode/slot_eviction.h"

#include <algorithm>

#include "decode/cold_rows.h"

namespace moebox {

Turnover::Turnover(Residency& residency, Copier& copier, const Stores& stores, bool exclusive, ColdTier* cold)
    : residency_(residency), copier_(copier), stores_(stores), exclusive_(exclusive), cold_(cold) {}

void Turnover::begin_token() {
  if (!exclusive_) return fresh_.clear();
  if (cold_) return;
  std::vector<bool> taken(stores_.n_rows);
  for (std::size_t key = 0; key < residency_.n_keys(); ++key)
    if (stores_.rows[key] >= 0) taken[stores_.rows[key]] = true;
  for (const Leaving& leaving : leaving_) taken[leaving.row] = true;
  free_rows_.clear();
  for (std::size_t row = 0; row < stores_.n_rows; ++row)
    if (!taken[row]) free_rows_.push_back(static_cast<std::int32_t>(row));
}

void Turnover::begin_step() {
  if (cold_) cold_->end_step();
  std::erase_if(leaving_, [this](const Leaving& leaving) {
    if (!copier_.reached(leaving.done)) return false;
    finish(leaving);
    return true;
  });
}

void Turnover::finish(const Leaving& leaving) {
  copier_.drop(leaving.done);
  residency_.hold(leaving.key, false);
  if (leaving.used) {
    free_row(leaving.key, leaving.row);
  } else {
    stores_.rows[leaving.key] = leaving.row;
    residency_.release(leaving.key);
    if (cold_) cold_->downloaded(leaving.key);
  }
}

// -1: none is free.
std::int32_t Turnover::take_row(std::int32_t key) {
  if (cold_) return cold_->take_row(key);
  if (free_rows_.empty()) return -1;
  const std::int32_t row = free_rows_.back();
  free_rows_.pop_back();
  return row;
}

void Turnover::free_row(std::int32_t key, std::int32_t row) {
  if (cold_) {
    cold_->vacate(key);
  } else {
    free_rows_.push_back(row);
  }
}

void Turnover::make_room(std::span<const std::int32_t> hits) {
  for (Leaving& leaving : leaving_) leaving.used |= std::ranges::find(hits, leaving.key) != hits.end();
  for (std::int32_t key : hits) residency_.hold(key, true);
  if (exclusive_) {
    choose_victims();
    retain_fresh();
    if (cold_) cold_->make_room();
  } else {
    residency_.trim();
  }
  for (std::int32_t key : hits) residency_.hold(key, false);
  for (const Leaving& leaving : leaving_) residency_.hold(leaving.key, true);
}

void Turnover::choose_victims() {
  victims_.clear();
  const std::size_t coming = residency_.n_free() + leaving_.size();
  if (coming >= residency_.reserve()) return;
  for (std::int32_t key : residency_.weakest(residency_.reserve() - coming)) {
    if (stores_.rows[key] < 0) {
      victims_.push_back(key);
    } else {
      residency_.release(key);
    }
  }
}

void Turnover::retain_fresh() {
  for (std::int32_t key : fresh_) {
    if (residency_.slot(key) < 0) continue;
    free_row(key, stores_.rows[key]);
    stores_.rows[key] = -1;
  }
  fresh_.clear();
}

void Turnover::begin_downloads() {
  for (std::int32_t key : victims_) {
    const std::int32_t row = take_row(key);
    if (row < 0) break;
    copier_.download(stores_.row(row), stores_.slot(residency_.slot(key)), stores_.expert_bytes);
    leaving_.push_back({key, row, copier_.mark(Copier::Way::down), false});
    residency_.hold(key, true);
  }
  victims_.clear();
}

void Turnover::settle() {
  if (cold_) cold_->end_step();
  for (const Leaving& leaving : leaving_) finish(leaving);
  leaving_.clear();
  if (!exclusive_) return;
  choose_victims();
  victims_.clear();
  retain_fresh();
}

void Turnover::undo() {
  if (cold_) cold_->end_step();
  for (Leaving& leaving : leaving_) {
    leaving.used = true;
    finish(leaving);
  }
  leaving_.clear();
  for (std::int32_t key : fresh_)
    if (stores_.rows[key] >= 0 && residency_.slot(key) >= 0) residency_.release(key);
  fresh_.clear();
}

}  // namespace moebox
