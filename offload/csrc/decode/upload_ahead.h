// Uploads of experts that the next layer will probably pick, while nothing else crosses PCIe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "decode/slot_eviction.h"
#include "device/copier.h"
#include "residency/residency.h"

namespace moebox {

// A layer's predicted experts are uploaded in small pieces, of which few are under way at once, so that the
// uploads that the layer turns out to need wait for a few pieces at most. Predictions only use slots that are
// free, and evict nothing.
//
// When the layer's picks are known, the uploads of correctly predicted experts go on from queued_bytes(), in
// the same order of copies. The others are given up: their slots are free for uploads queued behind the last
// piece.
class UploadAhead {
 public:
  struct Counts {
    static constexpr std::array kFields = {"issued",       "used",  "late",  "wrong",
                                           "wasted_bytes", "found", "picked"};
    // Experts whose upload began before their layer was routed. Of these: picked, uploaded and complete by
    // then; picked and uploaded, but not complete by then; not uploaded after all.
    std::int64_t issued = 0, used = 0, late = 0, wrong = 0;
    std::int64_t wasted_bytes = 0;  // of the wrong ones
    // Picks that were predicted, and all picks of layers that had predictions.
    std::int64_t found = 0, picked = 0;
  };
  static_assert(sizeof(Counts) == Counts::kFields.size() * sizeof(std::int64_t));

  UploadAhead(const Residency& residency, Copier& copier, const Stores& stores)
      : residency_(residency), copier_(copier), stores_(stores) {}

  // Keys that the coming layer will probably pick, the likeliest first. Gives up the last layer's uploads.
  void predict(std::span<const std::int32_t> keys);
  bool has_predictions() const { return !predicted_.empty(); }
  // Queues pieces until enough are under way. Only while no layer needs PCIe.
  void queue_pieces();

  // Counts how many of the layer's picks were predicted.
  void count_found(std::span<const std::int32_t> picks);
  bool any_begun() const { return !begun_.empty(); }
  // The first bytes of a key that are in its slot or on their way there; 0 if its upload has not begun.
  std::size_t queued_bytes(std::int32_t key) const;
  // The slot that a key's upload goes to, or -1 if it has not begun.
  std::int32_t slot(std::int32_t key) const;
  // The key stays in its slot; the caller uploads the rest of its bytes.
  void take(std::int32_t key);
  // Gives up all uploads that were not taken, and the predictions. Returns their bytes.
  std::size_t give_up();
  // The same when all copies are complete or have failed.
  void reset();

  const Counts& counts() const { return counts_; }

  // As small as copies can be without losing speed.
  std::size_t piece_bytes = 1 << 20;

 private:
  struct Begun {
    std::int32_t key, slot;
    std::size_t bytes = 0;
    std::uint64_t last_piece = 0;
    bool taken = false;
  };

  Begun* current();
  std::int32_t free_slot() const;
  void drop_complete_pieces();
  const Begun* find(std::int32_t key) const;

  const Residency& residency_;
  Copier& copier_;
  const Stores stores_;
  std::vector<std::int32_t> predicted_;
  std::size_t next_ = 0;  // of predicted_
  std::vector<Begun> begun_;
  std::deque<Copier::Mark> under_way_;  // a mark behind each piece
  std::uint64_t pieces_ = 0;            // queued so far
  Counts counts_;
};

}  // namespace moebox
