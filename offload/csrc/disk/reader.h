// Reads of shards by threads of their own: O_DIRECT, cut into pieces, several drives at once.
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

// Bytes of one of the reader's files.
struct Run {
  int file;
  std::uint64_t offset;
  std::size_t nbytes;
};

struct DriveTraffic {
  std::string folder;  // of the first file on it
  std::size_t depth;
  std::uint64_t bytes;
  double busy_s;  // while at least one read was under way
};

// Thread-safe. Each drive (st_dev) has as many threads as reads under way at once; they pull the next piece
// that has a copy on their drive, prefetched pieces only while no other piece waits for them.
class Reader {
 public:
  using Ticket = std::uint64_t;

  // piece_bytes: what is read at once, a multiple of 4096.
  Reader(std::size_t depth_per_drive, std::size_t piece_bytes);
  // Reads under way are finished first: their targets must still be there.
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // One logical file and its copies, of the same size, on any drives. Without `direct`, or where O_DIRECT is
  // refused, reads go through the page cache. Throws ReadFailure where one cannot be opened.
  int add_file(const std::vector<std::string>& copies, bool direct);
  // Whether all copies are read with O_DIRECT.
  bool direct(int file) const;
  // Reads under way at once on the drive that holds `path`'s file; before its first read, or more than
  // before.
  void set_depth(const std::string& path, std::size_t depth);

  // The runs land in `target` one behind the other. Never blocks. With a checksum (XXH3-64), the bytes are
  // compared when they are there; where they differ, each copy is read by itself before that is a failure.
  Ticket submit(std::span<const Run> runs, std::byte* target, bool prefetch,
                std::optional<std::uint64_t> checksum = {});
  // Finished, well or not.
  bool ready(Ticket ticket) const;
  // Throws ReadFailure. The ticket ends.
  void wait(Ticket ticket);
  // The same, false where it is not ready in time; then the ticket goes on.
  bool wait_for(Ticket ticket, std::chrono::microseconds time);
  // What was prefetched is needed now.
  void promote(Ticket ticket);
  // Drops pieces not begun and waits for those under way; returns the bytes read for nothing. The ticket
  // ends.
  std::size_t cancel(Ticket ticket);

  std::vector<DriveTraffic> traffic() const;
  // Copies that failed while another one was left: the failures, each told once.
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
  void settle(const Task& task, std::optional<ReadFailure> failure, Lock& lock);
  bool try_another_copy(const Task& task, const ReadFailure& failure);
  void give_up(Copy& copy, const File& file, const ReadFailure& failure);
  void fail(Job& job, const ReadFailure& failure);
  void drop_queued(Job& job);
  void check(Job& job, Lock& lock);
  bool read_next_alone(Job& job);

  const std::size_t depth_, piece_bytes_;
  Faults faults_;
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
  std::deque<File> files_;  // never moved: pieces point into it
  std::map<dev_t, std::unique_ptr<Drive>> drives_;
  std::map<Ticket, std::unique_ptr<Job>> jobs_;
  std::vector<ReadFailure> given_up_;
  Ticket next_ticket_ = 1;
  bool stop_ = false;
};

}  // namespace moebox
