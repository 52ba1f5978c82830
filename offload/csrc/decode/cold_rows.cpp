#include "decode/cold_rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace moebox {

ColdTier::ColdTier(Residency& residency, Reader& reader, std::vector<Extent> extents)
    : residency_(residency), reader_(reader), extents_(std::move(extents)) {
  if (extents_.size() != residency.n_keys())
    throw std::invalid_argument("extents: of " + std::to_string(extents_.size()) +
                                " experts given, of n_keys=" + std::to_string(residency.n_keys()) +
                                " needed");
}

void ColdTier::attach(const Stores& stores) {
  if (residency_.n_slots() != stores.n_rows)
    throw std::invalid_argument("cold: " + std::to_string(residency_.n_slots()) + " rows given, ram's " +
                                std::to_string(stores.n_rows) + " needed");
  for (std::size_t key = 0; key < extents_.size(); ++key) {
    std::size_t bytes = 0;
    for (const Run& run : extents_[key].runs) bytes += run.nbytes;
    if (bytes != stores.expert_bytes)
      throw std::invalid_argument("extents[" + std::to_string(key) + "]: " + std::to_string(bytes) +
                                  " bytes given, an expert's " + std::to_string(stores.expert_bytes) +
                                  " needed");
  }
  stores_ = stores;
}

void ColdTier::keep(std::int32_t key) {
  residency_.hold(key, true);
  kept_.push_back(key);
}

void ColdTier::end_step() {
  for (const std::int32_t key : kept_)
    if (residency_.slot(key) >= 0) residency_.hold(key, false);
  kept_.clear();
}

void ColdTier::make_room() {
  for (const std::int32_t key : residency_.trim()) stores_.rows[key] = -1;
}

std::int32_t ColdTier::take_row(std::int32_t key) {
  const std::int32_t row = residency_.place(key);
  if (row >= 0) residency_.hold(key, true);
  return row;
}

void ColdTier::downloaded(std::int32_t key) {
  stores_.rows[key] = residency_.slot(key);
  residency_.hold(key, false);
}

void ColdTier::vacate(std::int32_t key) {
  residency_.release(key);
  stores_.rows[key] = -1;
}

void ColdTier::read(std::int32_t key) {
  const std::int32_t row = residency_.place(key);
  if (row < 0) throw std::logic_error("no row of RAM is free for expert key " + std::to_string(key));
  keep(key);
  auto* target = reinterpret_cast<std::byte*>(stores_.row(row));
  const auto& [runs, checksum] = extents_[key];
  reads_.push_back({key, reader_.submit(runs, target, false, checksum)});
}

std::int32_t ColdTier::arrival() {
  auto ended = std::ranges::find_if(reads_, [this](const Read& read) { return reader_.ready(read.ticket); });
  if (ended == reads_.end()) ended = reads_.begin();
  const auto [key, ticket] = *ended;
  reads_.erase(ended);
  try {
    reader_.wait(ticket);
  } catch (...) {
    failed_ = key;
    vacate(key);
    throw;
  }
  stores_.rows[key] = residency_.slot(key);
  return key;
}

void ColdTier::cancel() {
  for (const Read& read : reads_) {
    reader_.cancel(read.ticket);
    vacate(read.key);
  }
  reads_.clear();
}

}  // namespace moebox
