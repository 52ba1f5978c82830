// Which expert has which row of RAM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "residency/residency.h"

namespace moebox {

// Rows of RAM as a cache of experts. A Residency, whose slots are the rows, says which key has which row and
// which keys are dropped first. The table says which rows are complete: table[key] is the row that holds all
// bytes of the key, or -1. A key that is being read from the drive, or downloaded from the GPU, has a row in
// the Residency only: place() gives it the row, and arrived() enters the row in the table.
class RamRows {
 public:
  // table: int32 [n_keys], which must outlive this object and which nothing else may write. Its entries are
  // taken over. The other arguments are those of Residency.
  RamRows(std::span<std::int32_t> table, std::size_t n_rows, std::size_t reserve, double half_life,
          std::size_t n_experts);

  Residency& residency() { return residency_; }
  const std::int32_t* table() const { return table_.data(); }

  // Gives each key the row that the table says, and frees all other rows. The rows in use must be the first
  // ones, without a gap. Scores stay.
  void take_over();

  // Gives the key the lowest free row; -1 if none is free. The key must not have a row.
  std::int32_t place(std::int32_t key);
  // The key's row holds all its bytes.
  void arrived(std::int32_t key) { table_[key] = residency_.slot(key); }
  // Frees the key's row. The key must have one.
  void drop(std::int32_t key);
  // Gives the row of `from`, which must have one, to `to`, which must have none. As after place(), the table
  // has no row for `to` before arrived().
  void hand_over(std::int32_t from, std::int32_t to);

  // Up to n keys that have a row, the weakest first, but none that is held and none of `busy`. Keys of `busy`
  // need not have a row.
  std::vector<std::int32_t> weakest(std::size_t n, std::span<const std::int32_t> busy = {});
  // Drops the weakest, as weakest() chooses them, until n_free rows are free.
  void make_room(std::size_t n_free, std::span<const std::int32_t> busy = {});

  // Holds the key's row until release_kept().
  void keep(std::int32_t key);
  void release_kept();

 private:
  const std::span<std::int32_t> table_;
  Residency residency_;
  std::vector<std::int32_t> kept_;
};

}  // namespace moebox
