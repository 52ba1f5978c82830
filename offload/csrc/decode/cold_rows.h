// Experts that are nowhere in memory: rows of RAM for them, and their reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "decode/slot_eviction.h"
#include "disk/reader.h"
#include "residency/residency.h"

namespace moebox {

// Where RAM and the GPU do not hold the model together, the disk has the rest of it. RAM's rows are the slots
// of a Residency. Its reserve is free when a step begins to read, so that every cold expert finds a row; the
// weakest leave before the next step's reads, and a newcomer that scores lowest is the first to go.
//
// Stores::rows[key] is set once the bytes are there: while they are read, or come down from the GPU, the key
// has a row in the Residency only.
class ColdTier {
 public:
  // Where an expert lies, and the XXH3-64 of its bytes where that is to be compared.
  struct Extent {
    std::vector<Run> runs;
    std::optional<std::uint64_t> checksum;
  };

  // An extent for each key.
  ColdTier(Residency& residency, Reader& reader, std::vector<Extent> extents);
  // Before anything else.
  void attach(const Stores& stores);

  void set_tick(std::int64_t tick) { residency_.set_tick(tick); }
  void use(std::int32_t key) { residency_.use(key, 1); }
  void update_values(std::span<const std::int32_t> picks) { residency_.update_values(picks); }
  // The key's row stays until end_step().
  void keep(std::int32_t key);
  void end_step();
  // The weakest leave RAM until the reserve is free.
  void make_room();

  // A row for a key that is downloaded, or -1.
  std::int32_t take_row(std::int32_t key);
  void downloaded(std::int32_t key);
  // The key gives its row up.
  void vacate(std::int32_t key);

  // Begins to read a key into a free row.
  void read(std::int32_t key);
  bool reading() const { return !reads_.empty(); }
  // Waits until a read ends, of several that have ended the oldest, and returns its key. Throws ReadFailure.
  std::int32_t arrival();
  // Gives up all reads.
  void cancel();
  // Whose read failed last, or -1.
  std::int32_t failed() const { return failed_; }

 private:
  struct Read {
    std::int32_t key;
    Reader::Ticket ticket;
  };

  Residency& residency_;
  Reader& reader_;
  const std::vector<Extent> extents_;
  Stores stores_{};
  std::vector<std::int32_t> kept_;
  std::vector<Read> reads_;
  std::int32_t failed_ = -1;
};

}  // namespace moebox
