#include "disk/shard_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

namespace moebox {

namespace {

constexpr int kRetries = 100;

std::string describe(ReadFailure::Kind kind, const std::string& path, std::uint64_t offset, int error) {
  const std::string place = path + ": byte " + std::to_string(offset) + ": ";
  switch (kind) {
    case ReadFailure::Kind::io:
      return place + std::strerror(error);
    case ReadFailure::Kind::short_read:
      return place + "the file ends before it should";
    case ReadFailure::Kind::changed:
      return place + "the file has changed since it was opened";
    case ReadFailure::Kind::checksum:
      return place + "the checksum differs";
  }
  return place;
}

bool again(int error, int attempt) {
  if (attempt >= kRetries || (error != EINTR && error != EAGAIN)) return false;
  if (error == EAGAIN) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return true;
}

}  // namespace

ReadFailure::ReadFailure(Kind kind, std::string path, std::uint64_t offset, int error)
    : std::runtime_error(describe(kind, path, offset, error)),
      kind(kind),
      path(std::move(path)),
      offset(offset),
      error(error) {}

const char* ReadFailure::kind_name() const {
  static constexpr std::array kNames = {"io", "short_read", "changed", "checksum"};
  return kNames[static_cast<std::size_t>(kind)];
}

void Faults::add(Fault fault) {
  const std::lock_guard guard(mutex_);
  faults_.push_back(std::move(fault));
  any_ = true;
}

std::optional<Fault> Faults::next(const std::string& path, bool opening) {
  if (!any_) return std::nullopt;
  const std::lock_guard guard(mutex_);
  for (Fault& fault : faults_) {
    if (opening != (fault.kind == Fault::Kind::refuse_direct) || !path.starts_with(fault.prefix)) continue;
    if (fault.after > 0) {
      --fault.after;
    } else if (fault.count > 0) {
      --fault.count;
      return fault;
    }
  }
  return std::nullopt;
}

void Bounce::Free::operator()(std::byte* memory) const { std::free(memory); }

std::byte* Bounce::reserve(std::size_t nbytes) {
  if (nbytes > size_) {
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kPage, nbytes)));
    if (!memory_) throw std::bad_alloc();
    size_ = nbytes;
  }
  return memory_.get();
}

ShardFile::ShardFile(std::string path, bool direct, Faults& faults)
    : path_(std::move(path)), faults_(faults), direct_(direct) {
  if (direct_) descriptor_ = open_with(O_DIRECT);
  if (direct_ && (descriptor_ < 0 || refuses_direct())) {
    if (descriptor_ >= 0) close(descriptor_);
    direct_ = false;
  }
  if (!direct_) descriptor_ = open_with(0);
  const auto identity = descriptor_ < 0 ? std::nullopt : identify();
  if (!identity) {
    const int error = errno;
    if (descriptor_ >= 0) close(descriptor_);
    throw ReadFailure(ReadFailure::Kind::io, path_, 0, error);
  }
  identity_ = *identity;
}

ShardFile::~ShardFile() { close(descriptor_); }

int ShardFile::open_with(int flags) const { return open(path_.c_str(), O_RDONLY | O_CLOEXEC | flags); }

// Tries a read: some file systems open a file with O_DIRECT but refuse to read it.
bool ShardFile::refuses_direct() const {
  if (faults_.next(path_, true)) return true;
  Bounce page;
  return pread(descriptor_, page.reserve(kPage), kPage, 0) < 0 && (errno == EINVAL || errno == ENOTSUP);
}

std::optional<ShardFile::Identity> ShardFile::identify() const {
  struct stat status;
  if (fstat(descriptor_, &status) != 0) return std::nullopt;
  return Identity{status.st_dev, status.st_ino, status.st_size,
                  status.st_mtim.tv_sec * std::int64_t{1'000'000'000} + status.st_mtim.tv_nsec};
}

std::optional<ReadFailure> ShardFile::read(std::byte* target, std::uint64_t offset, std::size_t nbytes,
                                           Bounce& bounce) const {
  std::optional<ReadFailure> failure;
  if (!direct_ || (on_page(offset, target) && nbytes % kPage == 0)) {
    failure = read_range(target, offset, nbytes, nbytes);
  } else {
    const std::uint64_t begin = page_floor(offset), end = page_floor(offset + nbytes + kPage - 1);
    std::byte* pages = bounce.reserve(end - begin);
    failure = read_range(pages, begin, end - begin, offset + nbytes - begin);
    if (!failure) std::memcpy(target, pages + (offset - begin), nbytes);
  }
  if (failure && failure->kind == ReadFailure::Kind::io) return failure;
  const auto identity = identify();
  if (!identity) return ReadFailure(ReadFailure::Kind::io, path_, offset, errno);
  if (*identity != identity_) return ReadFailure(ReadFailure::Kind::changed, path_, offset);
  return failure;
}

// Reads up to `nbytes`, at least the first `needed`: a file may end within its last page.
std::optional<ReadFailure> ShardFile::read_range(std::byte* to, std::uint64_t begin, std::size_t nbytes,
                                                 std::size_t needed) const {
  std::size_t done = 0;
  for (int attempt = 0;;) {
    const ssize_t got = read_once(to + done, nbytes - done, begin + done);
    if (got < 0) {
      const int error = errno;
      if (again(error, attempt++)) continue;
      return ReadFailure(ReadFailure::Kind::io, path_, begin + done, error);
    }
    const std::size_t reached = done + static_cast<std::size_t>(got);
    if (reached >= needed) return std::nullopt;
    const std::size_t next = direct_ ? page_floor(reached) : reached;
    if (got == 0 || (next == done && ++attempt == kRetries))
      return ReadFailure(ReadFailure::Kind::short_read, path_, begin + reached);
    done = next;
  }
}

ssize_t ShardFile::read_once(std::byte* to, std::size_t nbytes, std::uint64_t offset) const {
  const auto fault = faults_.next(path_, false);
  if (fault && fault->kind == Fault::Kind::error) {
    errno = static_cast<int>(fault->value);
    return -1;
  }
  if (fault && fault->kind == Fault::Kind::delay)
    std::this_thread::sleep_for(std::chrono::microseconds(fault->value));
  ssize_t got = pread(descriptor_, to, nbytes, static_cast<off_t>(offset));
  if (fault && fault->kind == Fault::Kind::shorten && got > fault->value) {
    std::memset(to + fault->value, 0xEE, static_cast<std::size_t>(got - fault->value));
    got = fault->value;
  }
  if (fault && fault->kind == Fault::Kind::flip)
    for (ssize_t i = 0; i < got; ++i) to[i] ^= static_cast<std::byte>(fault->value);
  return got;
}

}  // namespace moebox
