// Reads shards with threads of its own: with O_DIRECT, in pieces, from several drives at once.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "disk/shard_file.h"

namespace moebox {

// A range of bytes of one of the reader's files.
struct Run {
  int file;
  std::uint64_t offset;
  std::size_t nbytes;
};

struct DriveTraffic {
  std::string folder;  // of the first file on the drive
  std::size_t depth;
  std::uint64_t bytes;
  double busy_s;  // time with at least one read under way
};

// Thread-safe. Each drive (st_dev) has one thread for each read that may be under way at once. A thread takes
// the next piece of which its drive has a copy. It takes prefetched pieces only while no other piece waits.
class Reader {
 public:
  using Ticket = std::uint64_t;

  // piece_bytes: size of one read, a multiple of 4096.
  Reader(std::size_t depth_per_drive, std::size_t piece_bytes);
  // Waits for reads under way, so their targets must still exist.
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Adds a file with copies of the same size on any drives, and returns its number. Without `direct`, or
  // where the file system refuses O_DIRECT, reads go through the page cache. Throws ReadFailure if a copy
  // cannot be opened.
  int add_file(const std::vector<std::string>& copies, bool direct);
  // Whether all copies are read with O_DIRECT.
  bool direct(int file) const;
  // Sets how many reads may be under way at once on the drive that holds `path`. Call it before the drive's
  // first read, or with a larger number than before.
  void set_depth(const std::string& path, std::size_t depth);

  // Begins to read the runs into `target`, one behind the other. Never blocks. A checksum (XXH3-64) is
  // compared when all bytes are there. If it differs, each copy is read as a whole, and the job fails if none
  // is right.
  Ticket submit(std::span<const Run> runs, std::byte* target, bool prefetch,
                std::optional<std::uint64_t> checksum = {});
  // Whether the job has ended, with or without a failure.
  bool ready(Ticket ticket) const;
  // Waits for the job. Throws ReadFailure. The ticket is invalid afterwards.
  void wait(Ticket ticket);
  // The same, but returns false if the job has not ended in time; the ticket stays valid then.
  bool wait_for(Ticket ticket, std::chrono::microseconds time);
  // Turns a prefetch into a read that is needed now.
  void promote(Ticket ticket);
  // Drops pieces that have not begun, and waits for those under way. Returns the bytes that were read for
  // nothing. The ticket is invalid afterwards.
  std::size_t cancel(Ticket ticket);

  std::vector<DriveTraffic> traffic() const;
  // Failures of copies that were given up because another copy was left, since the last call.
  std::vector<ReadFailure> take_given_up();
  void inject(Fault fault) { faults_.add(std::move(fault)); }

 private:
  struct Copy;
  struct File;
  struct Piece;
  struct Job;
  struct Drive;

  struct Task {
    Piece* piece = nullptr;
    Copy* copy = nullptr;

    explicit operator bool() const { return piece; }
  };
  using Lock = std::unique_lock<std::mutex>;

  Drive& drive_of(const ShardFile& file);
  void cut(const Run& run, std::byte* target, Job& job);
  Job& job_of(Ticket ticket) const;
  void enqueue(Piece& piece, bool front);
  void withdraw(Piece& piece);
  Copy* usable_copy(const Piece& piece, const Drive* drive);
  Task take(Drive& drive);
  Task take_own(Job& job);
  void work(Drive& drive);
  void run(const Task& task, Bounce& bounce, Lock& lock);
  void end_piece(const Task& task, std::optional<ReadFailure> failure, Lock& lock);
  bool try_another_copy(const Task& task, const ReadFailure& failure);
  void give_up(Copy& copy, const File& file, const ReadFailure& failure);
  void fail(Job& job, const ReadFailure& failure);
  void drop_queued(Job& job);
  void compare_checksum(Job& job, Lock& lock);
  bool read_next_copy(Job& job);

  const std::size_t depth_, piece_bytes_;
  Faults faults_;
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
  std::deque<File> files_;  // a deque, since pieces point to its elements
  std::map<dev_t, std::unique_ptr<Drive>> drives_;
  std::map<Ticket, std::unique_ptr<Job>> jobs_;
  std::vector<ReadFailure> given_up_;
  Ticket next_ticket_ = 1;
  bool stop_ = false;
};

}  // namespace moebox
