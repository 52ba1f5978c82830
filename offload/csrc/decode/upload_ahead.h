// Uploads on a guess: experts that the next layer will probably pick, while the road to the GPU is idle.
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

// One layer's guessed experts go up in small pieces, few of them under way at once, into slots that are free
// and stay so: nobody leaves for a guess, and what the layer turns out to need waits for a few pieces at
// most. When its picks are known, the layer's own uploads go on where a right guess has got to (`bytes`,
// `slot`), in the same order of copies; the rest is forgotten, and its slots are used for others behind the
// last piece.
class AheadUploads {
 public:
  struct Counts {
    static constexpr std::array kFields = {"issued",       "used",  "late",  "wrong",
                                           "wasted_bytes", "found", "picked"};
    // Experts begun; of these there when they were picked and uploaded, still coming then, or neither.
    std::int64_t issued = 0, used = 0, late = 0, wrong = 0;
    std::int64_t wasted_bytes = 0;
    std::int64_t found = 0,
                 picked = 0;  // picks that were among the guesses; picks that there were guesses for
  };
  static_assert(sizeof(Counts) == Counts::kFields.size() * sizeof(std::int64_t));

  AheadUploads(const Residency& residency, Copier& copier, const Stores& stores)
      : residency_(residency), copier_(copier), stores_(stores) {}

  // The coming layer's guessed keys, the likeliest first. The last layer's are forgotten.
  void guess(std::span<const std::int32_t> keys);
  bool guessed() const { return !guesses_.empty(); }
  // Queues pieces until enough are under way: while nothing else has to be uploaded.
  void feed();

  // The layer picked these keys.
  void compare(std::span<const std::int32_t> picks);
  // Of a key's bytes, how many are in its slot or on their way; 0: none, and no slot.
  std::size_t bytes(std::int32_t key) const;
  std::int32_t slot(std::int32_t key) const;
  bool begun() const { return !begun_.empty(); }
  // The key is uploaded to its slot, the rest of it by the caller.
  void take(std::int32_t key);
  // Gives up what was not taken; returns its bytes.
  std::size_t forget();
  // All copies are complete, or failed.
  void recover();

  const Counts& counts() const { return counts_; }

  // As small as copies can be without losing speed: what a layer needs may have to wait for them.
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
  void poll();
  const Begun* find(std::int32_t key) const;

  const Residency& residency_;
  Copier& copier_;
  const Stores stores_;
  std::vector<std::int32_t> guesses_;
  std::size_t next_guess_ = 0;
  std::vector<Begun> begun_;
  std::deque<Copier::Mark> under_way_;  // pieces
  std::uint64_t pieces_ = 0;            // queued so far
  Counts counts_;
};

}  // namespace moebox
