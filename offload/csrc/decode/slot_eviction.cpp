#include "decode/slot_eviction.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moebox {

SlotEviction::SlotEviction(Residency& residency, Copier& copier, const Stores& stores, RamRows* rows)
    : residency_(residency), copier_(copier), stores_(stores), rows_(rows) {
  if (!rows_) return;
  if (rows_->table() != stores.rows)
    throw std::invalid_argument("ram_rows: another array given than the table of rows");
  if (rows_->residency().n_slots() != stores.n_rows)
    throw std::invalid_argument("rows: " + std::to_string(rows_->residency().n_slots()) +
                                " rows given, ram's " + std::to_string(stores.n_rows) + " needed");
}

void SlotEviction::begin_token() {
  if (!rows_) uploaded_.clear();
}

void SlotEviction::begin_step() {
  if (rows_) rows_->release_kept();
  std::erase_if(downloads_, [this](const Download& download) {
    if (!copier_.reached(download.done)) return false;
    end(download);
    return true;
  });
}

void SlotEviction::end(const Download& download) {
  copier_.drop(download.done);
  residency_.hold(download.key, false);
  rows_->residency().hold(download.key, false);
  if (download.used) {
    rows_->drop(download.key);
  } else {
    rows_->arrived(download.key);
    residency_.release(download.key);
  }
}

void SlotEviction::make_room(std::span<const std::int32_t> hits) {
  for (Download& download : downloads_) download.used |= std::ranges::find(hits, download.key) != hits.end();
  for (std::int32_t key : hits) residency_.hold(key, true);
  if (rows_) {
    choose_victims();
    free_uploaded_rows();
    rows_->make_room(rows_->residency().reserve());
  } else {
    residency_.trim();
  }
  for (std::int32_t key : hits) residency_.hold(key, false);
  for (const Download& download : downloads_) residency_.hold(download.key, true);
}

void SlotEviction::choose_victims() {
  victims_.clear();
  const std::size_t coming = residency_.n_free() + downloads_.size();
  if (coming >= residency_.reserve()) return;
  for (std::int32_t key : residency_.weakest(residency_.reserve() - coming)) {
    if (stores_.rows[key] < 0) {
      victims_.push_back(key);
    } else {
      residency_.release(key);
    }
  }
}

void SlotEviction::free_uploaded_rows() {
  for (std::int32_t key : uploaded_)
    if (residency_.slot(key) >= 0) rows_->drop(key);
  uploaded_.clear();
}

void SlotEviction::begin_downloads() {
  for (std::int32_t key : victims_) {
    const std::int32_t row = rows_->place(key);
    if (row < 0) break;
    rows_->residency().hold(key, true);
    copier_.download(stores_.row(row), stores_.slot(residency_.slot(key)), stores_.expert_bytes);
    downloads_.push_back({key, copier_.mark(Copier::Way::down), false});
    residency_.hold(key, true);
  }
  victims_.clear();
}

void SlotEviction::finish() {
  for (const Download& download : downloads_) end(download);
  downloads_.clear();
  if (!rows_) return;
  rows_->release_kept();
  choose_victims();
  victims_.clear();
  free_uploaded_rows();
}

void SlotEviction::undo() {
  for (Download& download : downloads_) {
    download.used = true;
    end(download);
  }
  downloads_.clear();
  if (rows_) rows_->release_kept();
  for (std::int32_t key : uploaded_)
    if (stores_.rows[key] >= 0 && residency_.slot(key) >= 0) residency_.release(key);
  uploaded_.clear();
}

}  // namespace moebox
