// Reads experts that are neither in RAM nor on the GPU, into rows of RAM, while a token is decoded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "decode/slot_eviction.h"
#include "disk/reader.h"
#include "residency/ram_rows.h"

namespace moebox {

// Where RAM and the GPU together do not hold the model, RAM's rows are a cache of the drive. The reserve of
// the rows is free when a step begins to read, so that every cold expert finds a row. Before the next step's
// reads the weakest experts are dropped, new ones included, until the reserve is free again.
class ColdReader {
 public:
  // Where an expert lies, and the XXH3-64 of its bytes if it is to be verified.
  struct Extent {
    std::vector<Run> runs;
    std::optional<std::uint64_t> checksum;
  };

  // extents: of all keys.
  ColdReader(RamRows& rows, Reader& reader, std::vector<Extent> extents);
  // Says where the rows lie; called once, before any read.
  void attach(const Stores& stores);

  RamRows& rows() { return rows_; }
  // Begins to read a key into a free row, and keeps the row for this step.
  void read(std::int32_t key);
  bool reading() const { return !reads_.empty(); }
  // Waits until a read has ended, and returns its key. If several have ended, it is the one that began first.
  // Throws ReadFailure.
  std::int32_t arrival();
  // Cancels all reads.
  void cancel();
  // The key whose read failed last, or -1.
  std::int32_t failed() const { return failed_; }

 private:
  struct Read {
    std::int32_t key;
    Reader::Ticket ticket;
  };

  RamRows& rows_;
  Reader& reader_;
  const std::vector<Extent> extents_;
  Stores stores_{};
  std::vector<Read> reads_;
  std::int32_t failed_ = -1;
};

}  // namespace moebox
