#include "decode/upload_ahead.h"

#include <algorithm>

namespace moebox {
namespace {

constexpr std::size_t kPiecesUnderWay = 2;

}  // namespace

void UploadAhead::predict(std::span<const std::int32_t> keys) {
  give_up();
  predicted_.assign(keys.begin(), keys.end());
}

void UploadAhead::queue_pieces() {
  if (!has_predictions()) return;
  drop_complete_pieces();
  while (under_way_.size() < kPiecesUnderWay) {
    Begun* expert = current();
    if (!expert) return;
    const std::size_t bytes = std::min(piece_bytes, stores_.expert_bytes - expert->bytes);
    copier_.upload(stores_.slot(expert->slot) + expert->bytes,
                   stores_.row(stores_.rows[expert->key]) + expert->bytes, bytes);
    under_way_.push_back(copier_.mark(Copier::Way::up));
    expert->bytes += bytes;
    expert->last_piece = ++pieces_;
  }
}

// The expert that the next piece belongs to: one expert is completed before the next one begins.
UploadAhead::Begun* UploadAhead::current() {
  if (!begun_.empty() && begun_.back().bytes < stores_.expert_bytes) return &begun_.back();
  while (next_ < predicted_.size()) {
    const std::int32_t key = predicted_[next_++];
    if (residency_.slot(key) >= 0 || stores_.rows[key] < 0) continue;
    const std::int32_t slot = free_slot();
    if (slot < 0) return nullptr;
    ++counts_.issued;
    return &begun_.emplace_back(Begun{key, slot});
  }
  return nullptr;
}

std::int32_t UploadAhead::free_slot() const {
  for (const std::int32_t slot : residency_.free())
    if (std::ranges::find(begun_, slot, &Begun::slot) == begun_.end()) return slot;
  return -1;
}

void UploadAhead::drop_complete_pieces() {
  while (!under_way_.empty() && copier_.reached(under_way_.front())) {
    copier_.drop(under_way_.front());
    under_way_.pop_front();
  }
}

void UploadAhead::count_found(std::span<const std::int32_t> picks) {
  if (!has_predictions()) return;
  counts_.picked += static_cast<std::int64_t>(picks.size());
  for (const std::int32_t key : picks)
    counts_.found += std::ranges::find(predicted_, key) != predicted_.end();
}

const UploadAhead::Begun* UploadAhead::find(std::int32_t key) const {
  const auto found = std::ranges::find(begun_, key, &Begun::key);
  return found == begun_.end() ? nullptr : &*found;
}

std::size_t UploadAhead::queued_bytes(std::int32_t key) const {
  const Begun* begun = find(key);
  return begun ? begun->bytes : 0;
}

std::int32_t UploadAhead::slot(std::int32_t key) const {
  const Begun* begun = find(key);
  return begun ? begun->slot : -1;
}

void UploadAhead::take(std::int32_t key) {
  drop_complete_pieces();
  Begun& begun = *std::ranges::find(begun_, key, &Begun::key);
  begun.taken = true;
  const bool complete =
      begun.bytes == stores_.expert_bytes && begun.last_piece + under_way_.size() <= pieces_;
  ++(complete ? counts_.used : counts_.late);
}

std::size_t UploadAhead::give_up() {
  std::size_t wasted = 0;
  for (const Begun& begun : begun_) {
    if (begun.taken) continue;
    ++counts_.wrong;
    wasted += begun.bytes;
  }
  counts_.wasted_bytes += static_cast<std::int64_t>(wasted);
  begun_.clear();
  predicted_.clear();
  next_ = 0;
  return wasted;
}

void UploadAhead::reset() {
  for (const Copier::Mark piece : under_way_) copier_.drop(piece);
  under_way_.clear();
  give_up();
}

}  // namespace moebox
