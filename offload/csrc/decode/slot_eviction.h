// Evicts experts from the GPU's slots between two layer steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "device/copier.h"
#include "residency/ram_rows.h"
#include "residency/residency.h"

namespace moebox {

// Rows of RAM and slots of the GPU; each holds one expert. rows[key] is the key's row, or -1.
struct Stores {
  std::uintptr_t ram;
  std::size_t ram_stride, n_rows;
  const std::int32_t* rows;
  std::uintptr_t slab;
  std::size_t slab_stride;
  std::size_t expert_bytes;

  std::uintptr_t row(std::int32_t row) const { return ram + row * ram_stride; }
  std::uintptr_t slot(std::int32_t slot) const { return slab + slot * slab_stride; }
};

// Inclusive (`rows` is null): every expert has a row in RAM, so a victim's slot is free at once.
//
// Exclusive: an expert lies in RAM or on the GPU. An uploaded expert that is not evicted at the next step
// loses its row. A victim without a row is downloaded into a free row. The victim stays resident, and counts
// as a hit, until the download is complete; a victim that is picked before then keeps its slot and loses its
// row. Where RAM is a cache of the drive, no row may be free; the victim is then not evicted in this step.
//
// When the GPU has routed a layer, it has read all slots of the layer before. The calls of a step come after
// that, in the order in which they stand here.
class SlotEviction {
 public:
  SlotEviction(Residency& residency, Copier& copier, const Stores& stores, RamRows* rows);

  // Prefill may have changed slots and rows since the last token.
  void begin_token();
  // Frees the slots of victims whose download is complete.
  void begin_step();
  // Evicts the weakest, but none of `hits`, until `reserve` slots are free or will be after downloads.
  void make_room(std::span<const std::int32_t> hits);
  // Queues the downloads of the victims that make_room() chose.
  void begin_downloads();
  // An upload of the key is queued. The key keeps its row at least until the next step.
  void arrives(std::int32_t key) { uploaded_.push_back(key); }
  // All copies are complete: frees the slots of victims, and the rows of uploaded experts.
  void finish();
  // Copies have failed: victims keep their slots, and uploaded experts that still have a row lose theirs.
  void undo();

 private:
  struct Download {
    std::int32_t key;
    Copier::Mark done;
    bool used;  // picked since the download began
  };

  void choose_victims();
  void free_uploaded_rows();
  void end(const Download& download);

  Residency& residency_;
  Copier& copier_;
  const Stores stores_;
  RamRows* const rows_;
  std::vector<std::int32_t> uploaded_;  // in the last step
  std::vector<std::int32_t> victims_;   // to be downloaded
  std::vector<Download> downloads_;     // under way; their keys are held in slots and rows
};

}  // namespace moebox
