// Who leaves the GPU's slots between two layer steps, and what happens to the copies in RAM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "device/copier.h"
#include "residency/residency.h"

namespace moebox {

class ColdTier;

// Rows of RAM and slots of the GPU, of one stride each; a key's row is rows[key], or -1.
struct Stores {
  std::uintptr_t ram;
  std::size_t ram_stride, n_rows;
  std::int32_t* rows;
  std::uintptr_t slab;
  std::size_t slab_stride;
  std::size_t expert_bytes;

  std::uintptr_t row(std::int32_t row) const { return ram + row * ram_stride; }
  std::uintptr_t slot(std::int32_t slot) const { return slab + slot * slab_stride; }
};

// Inclusive: every expert has a row, so the weakest are simply forgotten.
//
// Exclusive: an expert that was uploaded and is not the weakest at the next step gives its row up; a victim
// without a row is downloaded into a free one first, and stays a hit until that is done. An expert always has
// a row or a slot. Where RAM has too few rows for that (`cold`), a victim for which none is free waits, and
// who leaves RAM is left to the disk.
//
// The GPU has left a layer when it routes the next one: a step's calls come after that, in this order.
class Turnover {
 public:
  // `cold` may be null; not if it is not exclusive.
  Turnover(Residency& residency, Copier& copier, const Stores& stores, bool exclusive, ColdTier* cold);

  // The stores may have been changed by others since the last token.
  void begin_token();
  // Ends downloads that are complete; their slots are free.
  void begin_step();
  // Forgets the weakest, but none of `hits`, until `reserve` slots are free or on their way to it.
  void make_room(std::span<const std::int32_t> hits);
  // Starts the downloads that make_room() decided on.
  void begin_downloads();
  // An upload of the key is queued; it keeps its row until the next step.
  void arrives(std::int32_t key) { fresh_.push_back(key); }
  // All copies are complete: ends what hangs on them.
  void settle();
  // Copies failed: nobody leaves, and arrivals that still have a row are forgotten.
  void undo();

 private:
  struct Leaving {
    std::int32_t key, row;
    Copier::Mark done;
    bool used;  // since: it stays
  };

  void choose_victims();
  void retain_fresh();
  void finish(const Leaving& leaving);
  std::int32_t take_row(std::int32_t key);
  void free_row(std::int32_t key, std::int32_t row);

  Residency& residency_;
  Copier& copier_;
  const Stores stores_;
  const bool exclusive_;
  ColdTier* const cold_;               // keeps account of the rows, if there is one
  std::vector<std::int32_t> fresh_;    // uploaded, and whether to keep them is open
  std::vector<std::int32_t> victims_;  // to be downloaded
  std::vector<Leaving> leaving_;       // being downloaded; held
  std::vector<std::int32_t> free_rows_;
};

}  // namespace moebox
