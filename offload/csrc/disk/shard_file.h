// One copy of a shard. It is opened once and read without the page cache; each read checks that the file has
// not changed.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace moebox {

inline constexpr std::uint64_t kPage = 4096;

inline std::uint64_t page_floor(std::uint64_t offset) { return offset / kPage * kPage; }

inline bool on_page(std::uint64_t offset, const std::byte* target) {
  return offset % kPage == 0 && reinterpret_cast<std::uintptr_t>(target) % kPage == 0;
}

class ReadFailure : public std::runtime_error {
 public:
  enum class Kind { io, short_read, changed, checksum };

  // `error` is the errno of Kind::io.
  ReadFailure(Kind kind, std::string path, std::uint64_t offset, int error = 0);

  const char* kind_name() const;

  Kind kind;
  std::string path;
  std::uint64_t offset;
  int error;
};

// For tests: after `after` reads of files whose path starts with `prefix`, the next `count` reads have this
// fault.
struct Fault {
  enum class Kind { error, shorten, flip, delay, refuse_direct };

  std::string prefix;
  Kind kind;
  std::int64_t value;  // by kind: errno; most bytes; mask that each byte is XORed with; microseconds
  std::size_t after, count;
};

class Faults {
 public:
  void add(Fault fault);
  std::optional<Fault> next(const std::string& path, bool opening);

 private:
  std::mutex mutex_;
  std::vector<Fault> faults_;
  std::atomic<bool> any_{false};
};

// Page-aligned memory of one thread, for reads that are not aligned. It grows to the largest request.
class Bounce {
 public:
  std::byte* reserve(std::size_t nbytes);

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

class ShardFile {
 public:
  // Reads go through the page cache without `direct`, or where the file system refuses O_DIRECT. Throws
  // ReadFailure.
  ShardFile(std::string path, bool direct, Faults& faults);
  ~ShardFile();
  ShardFile(const ShardFile&) = delete;
  ShardFile& operator=(const ShardFile&) = delete;

  const std::string& path() const { return path_; }
  bool direct() const { return direct_; }
  dev_t device() const { return identity_.device; }
  std::uint64_t size() const { return static_cast<std::uint64_t>(identity_.size); }

  // Reads straight into the target if it and the range are page-aligned; else all pages that the range
  // touches are read into `bounce` first. A file that was written to since it was opened fails with
  // Kind::changed; of a file that was replaced, the old one is read.
  std::optional<ReadFailure> read(std::byte* target, std::uint64_t offset, std::size_t nbytes,
                                  Bounce& bounce) const;

 private:
  struct Identity {
    dev_t device;
    ino_t inode;
    off_t size;
    std::int64_t modified_ns;

    bool operator==(const Identity&) const = default;
  };

  int open_with(int flags) const;
  bool refuses_direct() const;
  std::optional<Identity> identify() const;
  std::optional<ReadFailure> read_range(std::byte* to, std::uint64_t begin, std::size_t nbytes,
                                        std::size_t needed) const;
  ssize_t read_once(std::byte* to, std::size_t nbytes, std::uint64_t offset) const;

  const std::string path_;
  Faults& faults_;
  int descriptor_ = -1;
  bool direct_;
  Identity identity_;
};

}  // namespace moebox
