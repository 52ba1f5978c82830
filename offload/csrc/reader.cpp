#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "xxh3.h"

namespace moebox {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kPage = 4096;
constexpr int kRetries = 100;
constexpr std::size_t kMostCopies = 32;
enum Priority : std::size_t { kDemand, kPrefetch, kPriorities };

std::uint64_t page_floor(std::uint64_t offset) { return offset / kPage * kPage; }
std::uint64_t page_ceil(std::uint64_t offset) { return page_floor(offset + kPage - 1); }

bool on_page(std::uint64_t offset, const std::byte* target) {
  return offset % kPage == 0 && reinterpret_cast<std::uintptr_t>(target) % kPage == 0;
}

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

// What tells one state of a file from another.
struct Identity {
  dev_t device;
  ino_t inode;
  off_t size;
  std::int64_t modified_ns;

  bool operator==(const Identity&) const = default;
};

std::optional<Identity> identify(int descriptor) {
  struct stat status;
  if (fstat(descriptor, &status) != 0) return std::nullopt;
  return Identity{status.st_dev, status.st_ino, status.st_size,
                  status.st_mtim.tv_sec * std::int64_t{1'000'000'000} + status.st_mtim.tv_nsec};
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

struct Reader::Copy {
  std::string path;
  int descriptor;
  bool direct;
  Identity identity;
  std::uint32_t bit = 0;
  Drive* drive = nullptr;
  bool given_up = false;
};

struct Reader::File {
  std::vector<Copy> copies;
  std::vector<Drive*> drives;  // those that hold a copy, each once

  ~File() {
    for (const Copy& copy : copies) close(copy.descriptor);
  }
};

struct Reader::Piece {
  Job* job;
  File* file;
  std::uint64_t offset;
  std::size_t nbytes;
  std::byte* target;
  std::uint32_t tried = 0;  // bits of copies
  bool queued = false;
};

struct Reader::Job {
  std::vector<Piece> pieces;
  std::byte* target;
  std::size_t nbytes = 0;
  bool prefetch;
  std::optional<std::uint64_t> checksum;
  std::size_t unfinished = 0;  // pieces queued or under way
  std::size_t bytes_read = 0;
  std::optional<ReadFailure> failure;
  bool cancelled = false;
};

struct Reader::Drive {
  std::size_t depth;
  std::string folder;
  std::array<std::deque<Piece*>, kPriorities> queues;
  std::condition_variable wake;
  std::vector<std::thread> threads;
  std::size_t under_way = 0, prefetching = 0;
  std::uint64_t bytes = 0;
  Clock::time_point busy_since;
  Clock::duration busy{};

  // A read that is needed now waits for at most this part of the reads under way.
  std::size_t most_prefetching() const { return (depth + 1) / 2; }

  void begin(bool prefetch) {
    if (under_way++ == 0) busy_since = Clock::now();
    prefetching += prefetch;
  }
  void end(bool prefetch, std::size_t nbytes) {
    bytes += nbytes;
    prefetching -= prefetch;
    if (--under_way == 0) busy += Clock::now() - busy_since;
  }
};

// A thread's aligned memory for what does not lie on pages.
class Reader::Bounce {
 public:
  std::byte* reserve(std::size_t nbytes) {
    if (nbytes > size_) {
      memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kPage, nbytes)));
      if (!memory_) throw std::bad_alloc();
      size_ = nbytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

Reader::Reader(std::size_t depth_per_drive, std::size_t piece_bytes)
    : depth_(depth_per_drive), piece_bytes_(piece_bytes) {
  if (depth_per_drive == 0) throw std::invalid_argument("depth_per_drive: 0 given, at least 1 needed");
  if (piece_bytes == 0 || piece_bytes % kPage)
    throw std::invalid_argument("piece_bytes: " + std::to_string(piece_bytes) +
                                " given, a multiple of 4096 needed");
}

Reader::~Reader() {
  {
    const std::lock_guard guard(mutex_);
    stop_ = true;
    for (auto& [_, drive] : drives_) drive->wake.notify_all();
  }
  for (auto& [_, drive] : drives_)
    for (std::thread& thread : drive->threads) thread.join();
}

int Reader::add_file(const std::vector<std::string>& copies, bool direct) {
  if (copies.empty() || copies.size() > kMostCopies)
    throw std::invalid_argument("copies: " + std::to_string(copies.size()) + " given, 1 to " +
                                std::to_string(kMostCopies) + " needed");
  File opened;
  for (const std::string& path : copies) {
    opened.copies.push_back(open_copy(path, direct));
    opened.copies.back().bit = std::uint32_t{1} << (opened.copies.size() - 1);
    if (opened.copies.back().identity.size != opened.copies.front().identity.size)
      throw ReadFailure(ReadFailure::Kind::changed, path, 0);
  }
  const std::lock_guard guard(mutex_);
  for (Copy& copy : opened.copies) {
    copy.drive = &drive_of(copy);
    if (std::ranges::find(opened.drives, copy.drive) == opened.drives.end())
      opened.drives.push_back(copy.drive);
  }
  File& kept = files_.emplace_back();
  std::swap(kept.copies, opened.copies);
  std::swap(kept.drives, opened.drives);
  return static_cast<int>(files_.size() - 1);
}

Reader::Copy Reader::open_copy(const std::string& path, bool direct) {
  const auto open_with = [&](int flags) { return open(path.c_str(), O_RDONLY | O_CLOEXEC | flags); };
  int descriptor = direct ? open_with(O_DIRECT) : -1;
  if (descriptor >= 0 && refused_direct(path, descriptor)) {
    close(descriptor);
    descriptor = -1;
  }
  direct = descriptor >= 0;
  if (!direct) descriptor = open_with(0);
  if (descriptor < 0) throw ReadFailure(ReadFailure::Kind::io, path, 0, errno);
  const auto identity = identify(descriptor);
  if (!identity) {
    const int error = errno;
    close(descriptor);
    throw ReadFailure(ReadFailure::Kind::io, path, 0, error);
  }
  return {path, descriptor, direct, *identity};
}

// Some file systems let a file be opened with O_DIRECT and refuse its reads.
bool Reader::refused_direct(const std::string& path, int descriptor) {
  if (next_fault(path, true)) return true;
  Bounce page;
  return pread(descriptor, page.reserve(kPage), kPage, 0) < 0 && (errno == EINVAL || errno == ENOTSUP);
}

Reader::Drive& Reader::drive_of(const Copy& copy) {
  auto& drive = drives_[copy.identity.device];
  if (!drive) {
    drive = std::make_unique<Drive>();
    drive->depth = depth_;
    drive->folder = copy.path.substr(0, copy.path.find_last_of('/') + 1);
  }
  return *drive;
}

bool Reader::direct(int file) const {
  const std::lock_guard guard(mutex_);
  return std::ranges::all_of(files_.at(file).copies, &Copy::direct);
}

void Reader::set_depth(const std::string& path, std::size_t depth) {
  const std::lock_guard guard(mutex_);
  for (const File& file : files_)
    for (const Copy& copy : file.copies)
      if (copy.path == path) {
        if (depth == 0 || depth < copy.drive->threads.size())
          throw std::invalid_argument("depth: " + std::to_string(depth) + " given, at least the drive's " +
                                      std::to_string(copy.drive->threads.size()) + " threads needed");
        copy.drive->depth = depth;
        return;
      }
  throw std::invalid_argument("path: " + path + " is none of the reader's files");
}

// Whole pages go straight to a target on a page; the rest is cut at pages too, so that none is read twice.
void Reader::cut(const Run& run, std::byte* target, Job& job) const {
  File* file = const_cast<File*>(&files_.at(run.file));
  const bool straight = on_page(run.offset, target);
  std::uint64_t begin = run.offset;
  const std::uint64_t end = run.offset + run.nbytes;
  while (begin < end) {
    std::uint64_t next = std::min(page_floor(begin) + piece_bytes_, end);
    if (straight && next - begin >= kPage) next = page_floor(next);
    job.pieces.push_back({&job, file, begin, next - begin, target + (begin - run.offset)});
    begin = next;
  }
}

Reader::Ticket Reader::submit(std::span<const Run> runs, std::byte* target, bool prefetch,
                              std::optional<std::uint64_t> checksum) {
  std::size_t nbytes = 0;
  for (const Run& run : runs) nbytes += run.nbytes;
  if (checksum && nbytes < kXxh3Least)
    throw std::invalid_argument("checksum: given for " + std::to_string(nbytes) + " bytes, at least " +
                                std::to_string(kXxh3Least) + " needed");
  auto job = std::make_unique<Job>();
  job->target = target;
  job->prefetch = prefetch;
  job->checksum = checksum;
  const std::lock_guard guard(mutex_);
  for (const Run& run : runs) {
    cut(run, target + job->nbytes, *job);
    job->nbytes += run.nbytes;
  }
  job->unfinished = job->pieces.size();
  for (Piece& piece : job->pieces) enqueue(piece, false);
  jobs_.emplace(next_ticket_, std::move(job));
  return next_ticket_++;
}

Reader::Job& Reader::job_of(Ticket ticket) const {
  const auto found = jobs_.find(ticket);
  if (found == jobs_.end())
    throw std::invalid_argument("ticket: " + std::to_string(ticket) + " given, which is over or never was");
  return *found->second;
}

// To every drive with a copy; the first that takes it withdraws it from the others.
void Reader::enqueue(Piece& piece, bool front) {
  piece.queued = true;
  for (Drive* drive : piece.file->drives) {
    if (!usable_copy(piece, drive)) continue;
    auto& queue = drive->queues[piece.job->prefetch ? kPrefetch : kDemand];
    queue.insert(front ? queue.begin() : queue.end(), &piece);
    while (drive->threads.size() < drive->depth) drive->threads.emplace_back([=, this] { work(*drive); });
    drive->wake.notify_one();
  }
}

void Reader::withdraw(Piece& piece) {
  piece.queued = false;
  for (Drive* drive : piece.file->drives) {
    auto& queue = drive->queues[piece.job->prefetch ? kPrefetch : kDemand];
    if (const auto found = std::ranges::find(queue, &piece); found != queue.end()) queue.erase(found);
  }
}

// On `drive`, or on any.
Reader::Copy* Reader::usable_copy(const Piece& piece, const Drive* drive) {
  for (Copy& copy : piece.file->copies)
    if (!copy.given_up && !(piece.tried & copy.bit) && (!drive || copy.drive == drive)) return &copy;
  return nullptr;
}

Reader::Task Reader::take(Drive& drive) {
  for (std::size_t priority = 0; priority < kPriorities; ++priority) {
    if (priority == kPrefetch && drive.prefetching >= drive.most_prefetching()) break;
    auto& queue = drive.queues[priority];
    while (!queue.empty()) {
      Piece* piece = queue.front();
      if (Copy* copy = usable_copy(*piece, &drive)) {
        withdraw(*piece);
        return {piece, copy};
      }
      queue.pop_front();  // the copy was given up meanwhile; another drive has one
    }
  }
  return {};
}

void Reader::work(Drive& drive) {
  Bounce bounce;
  Lock lock(mutex_);
  for (;;) {
    Task task;
    drive.wake.wait(lock, [&] { return stop_ || (task = take(drive)).piece; });
    if (stop_) return;
    const bool prefetch = task.piece->job->prefetch;
    drive.begin(prefetch);
    lock.unlock();
    auto failure = read(task, bounce);
    lock.lock();
    drive.end(prefetch, failure ? 0 : task.piece->nbytes);
    settle(task, std::move(failure), lock);
  }
}

std::optional<ReadFailure> Reader::read(const Task& task, Bounce& bounce) {
  const Copy& copy = *task.copy;
  const std::uint64_t offset = task.piece->offset;
  const std::size_t nbytes = task.piece->nbytes;
  std::byte* target = task.piece->target;
  std::optional<ReadFailure> failure;
  if (!copy.direct || (on_page(offset, target) && nbytes % kPage == 0)) {
    failure = read_range(copy, target, offset, nbytes, nbytes);
  } else {
    const std::uint64_t begin = page_floor(offset), end = page_ceil(offset + nbytes);
    std::byte* pages = bounce.reserve(end - begin);
    failure = read_range(copy, pages, begin, end - begin, offset + nbytes - begin);
    if (!failure) std::memcpy(target, pages + (offset - begin), nbytes);
  }
  if (failure && failure->kind == ReadFailure::Kind::io) return failure;
  if (const auto identity = identify(copy.descriptor); !identity)
    return ReadFailure(ReadFailure::Kind::io, copy.path, offset, errno);
  else if (*identity != copy.identity)
    return ReadFailure(ReadFailure::Kind::changed, copy.path, offset);
  return failure;
}

// Up to `nbytes`, of which the first `needed` must be there: a file may end within its last page.
std::optional<ReadFailure> Reader::read_range(const Copy& copy, std::byte* to, std::uint64_t begin,
                                              std::size_t nbytes, std::size_t needed) {
  std::size_t done = 0;
  for (int attempt = 0;;) {
    const ssize_t got = read_at(copy, to + done, nbytes - done, begin + done);
    if (got < 0) {
      const int error = errno;
      if (again(error, attempt++)) continue;
      return ReadFailure(ReadFailure::Kind::io, copy.path, begin + done, error);
    }
    const std::size_t reached = done + static_cast<std::size_t>(got);
    if (reached >= needed) return std::nullopt;
    const std::size_t next = copy.direct ? page_floor(reached) : reached;
    if (got == 0 || (next == done && ++attempt == kRetries))
      return ReadFailure(ReadFailure::Kind::short_read, copy.path, begin + reached);
    done = next;
  }
}

ssize_t Reader::read_at(const Copy& copy, std::byte* to, std::size_t nbytes, std::uint64_t offset) {
  const auto fault = next_fault(copy.path, false);
  if (fault && fault->kind == Fault::Kind::error) {
    errno = static_cast<int>(fault->value);
    return -1;
  }
  if (fault && fault->kind == Fault::Kind::delay)
    std::this_thread::sleep_for(std::chrono::microseconds(fault->value));
  if (fault && fault->kind == Fault::Kind::shorten)
    nbytes = std::min(nbytes, static_cast<std::size_t>(fault->value));
  const ssize_t got = pread(copy.descriptor, to, nbytes, static_cast<off_t>(offset));
  if (fault && fault->kind == Fault::Kind::flip)
    for (ssize_t i = 0; i < got; ++i) to[i] ^= static_cast<std::byte>(fault->value);
  return got;
}

std::optional<Fault> Reader::next_fault(const std::string& path, bool opening) {
  if (!any_faults_) return std::nullopt;
  const std::lock_guard guard(faults_mutex_);
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

void Reader::inject(Fault fault) {
  const std::lock_guard guard(faults_mutex_);
  faults_.push_back(std::move(fault));
  any_faults_ = true;
}

void Reader::settle(const Task& task, std::optional<ReadFailure> failure, Lock& lock) {
  Job& job = *task.piece->job;
  if (failure && !job.failure && !job.cancelled && try_another_copy(task, *failure)) return;
  if (failure)
    fail(job, *failure);
  else
    job.bytes_read += task.piece->nbytes;
  if (job.unfinished == 1 && job.checksum && !job.failure && !job.cancelled) check(job, lock);
  if (--job.unfinished == 0) finished_.notify_all();
}

bool Reader::try_another_copy(const Task& task, const ReadFailure& failure) {
  Piece& piece = *task.piece;
  piece.tried |= task.copy->bit;
  if (!usable_copy(piece, nullptr)) return false;
  if (!task.copy->given_up) given_up_.push_back(failure);
  task.copy->given_up = true;
  enqueue(piece, true);
  return true;
}

void Reader::fail(Job& job, const ReadFailure& failure) {
  if (!job.failure) job.failure = failure;
  drop_queued(job);
}

void Reader::drop_queued(Job& job) {
  for (Piece& piece : job.pieces) {
    if (!piece.queued) continue;
    withdraw(piece);
    --job.unfinished;
  }
}

// The last piece has just been read: nobody else touches the job or its target now.
void Reader::check(Job& job, Lock& lock) {
  lock.unlock();
  const bool right = xxh3_64(job.target, job.nbytes) == *job.checksum;
  lock.lock();
  const Piece& first = job.pieces.front();
  if (!right) fail(job, {ReadFailure::Kind::checksum, first.file->copies.front().path, first.offset});
}

bool Reader::ready(Ticket ticket) const {
  const std::lock_guard guard(mutex_);
  return job_of(ticket).unfinished == 0;
}

void Reader::wait(Ticket ticket) {
  while (!wait_for(ticket, std::chrono::hours(1))) {
  }
}

bool Reader::wait_for(Ticket ticket, std::chrono::microseconds time) {
  Lock lock(mutex_);
  Job& job = job_of(ticket);
  if (!finished_.wait_for(lock, time, [&] { return job.unfinished == 0; })) return false;
  const auto failure = std::move(job.failure);
  jobs_.erase(ticket);
  if (failure) throw *failure;
  return true;
}

void Reader::promote(Ticket ticket) {
  const std::lock_guard guard(mutex_);
  Job& job = job_of(ticket);
  if (!job.prefetch) return;
  std::vector<Piece*> queued;
  for (Piece& piece : job.pieces)
    if (piece.queued) queued.push_back(&piece);
  for (Piece* piece : queued) withdraw(*piece);
  job.prefetch = false;
  for (Piece* piece : queued) enqueue(*piece, false);
}

std::size_t Reader::cancel(Ticket ticket) {
  Lock lock(mutex_);
  Job& job = job_of(ticket);
  job.cancelled = true;
  drop_queued(job);
  finished_.wait(lock, [&] { return job.unfinished == 0; });
  const std::size_t bytes = job.bytes_read;
  jobs_.erase(ticket);
  return bytes;
}

std::vector<DriveTraffic> Reader::traffic() const {
  const std::lock_guard guard(mutex_);
  std::vector<DriveTraffic> all;
  for (const auto& [_, drive] : drives_) {
    auto busy = drive->busy;
    if (drive->under_way) busy += Clock::now() - drive->busy_since;
    all.push_back({drive->folder, drive->depth, drive->bytes, std::chrono::duration<double>(busy).count()});
  }
  return all;
}

std::vector<ReadFailure> Reader::take_given_up() {
  const std::lock_guard guard(mutex_);
  return std::exchange(given_up_, {});
}

}  // namespace moebox
