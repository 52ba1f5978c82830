#include "disk/reader.h"

#include <algorithm>
#include <array>
#include <bit>
#include <stdexcept>
#include <thread>

#include "disk/xxh3.h"

namespace moebox {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kMostCopies = 32;
constexpr std::size_t kSmall = 256 << 10;
enum Priority : std::size_t { kDemand, kPrefetch, kPriorities };

}  // namespace

struct Reader::Copy {
  std::unique_ptr<ShardFile> file;
  std::uint32_t bit;
  Drive* drive;
  bool given_up = false;
};

struct Reader::File {
  std::vector<Copy> copies;
  std::vector<Drive*> drives;  // drives with at least one copy, each once
};

struct Reader::Piece {
  Job* job;
  File* file;
  std::uint64_t offset;
  std::size_t nbytes;
  std::byte* target;
  std::uint32_t tried = 0;   // bits of the copies that failed
  std::uint32_t source = 0;  // bit of the copy that was read
  bool queued = false;

  std::uint32_t bit_of(std::size_t copy) const {
    return std::uint32_t{1} << std::min(copy, file->copies.size() - 1);
  }
};

struct Reader::Job {
  std::vector<Piece> pieces;
  std::byte* target;
  std::size_t nbytes = 0;
  bool prefetch;
  std::optional<std::uint64_t> checksum;
  std::size_t unfinished = 0;  // pieces queued or under way
  std::size_t bytes_read = 0;
  std::size_t next_copy = 0;  // after a wrong checksum: the copy to read as a whole next
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

  // Prefetched reads that may be under way at once: the other threads are free for reads that are needed now.
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
  std::vector<std::unique_ptr<ShardFile>> opened;
  for (const std::string& path : copies) {
    opened.push_back(std::make_unique<ShardFile>(path, direct, faults_));
    if (opened.back()->size() != opened.front()->size())
      throw ReadFailure(ReadFailure::Kind::changed, path, 0);
  }
  const std::lock_guard guard(mutex_);
  File& file = files_.emplace_back();
  for (auto& copy : opened) {
    Drive& drive = drive_of(*copy);
    file.copies.push_back({std::move(copy), std::uint32_t{1} << file.copies.size(), &drive});
    if (std::ranges::find(file.drives, &drive) == file.drives.end()) file.drives.push_back(&drive);
  }
  return static_cast<int>(files_.size() - 1);
}

Reader::Drive& Reader::drive_of(const ShardFile& file) {
  auto& drive = drives_[file.device()];
  if (!drive) {
    drive = std::make_unique<Drive>();
    drive->depth = depth_;
    drive->folder = file.path().substr(0, file.path().find_last_of('/') + 1);
  }
  return *drive;
}

bool Reader::direct(int file) const {
  const std::lock_guard guard(mutex_);
  return std::ranges::all_of(files_.at(file).copies, [](const Copy& copy) { return copy.file->direct(); });
}

void Reader::set_depth(const std::string& path, std::size_t depth) {
  const std::lock_guard guard(mutex_);
  for (const File& file : files_)
    for (const Copy& copy : file.copies)
      if (copy.file->path() == path) {
        if (depth == 0 || depth < copy.drive->threads.size())
          throw std::invalid_argument("depth: " + std::to_string(depth) + " given, at least the drive's " +
                                      std::to_string(copy.drive->threads.size()) + " threads needed");
        copy.drive->depth = depth;
        return;
      }
  throw std::invalid_argument("path: " + path + " is none of the reader's files");
}

// Pieces end on pages of the file, so that no page is read twice. Where range and target are page-aligned,
// whole pages are read straight into the target, and the rest of the last page is a piece of its own.
void Reader::cut(const Run& run, std::byte* target, Job& job) {
  File* file = &files_.at(run.file);
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

// Queues the piece on every drive with a copy. The drive that takes it first removes it from the other
// queues.
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

// A copy to read the piece from, on `drive` or, if `drive` is null, on any drive; null if no copy is left. A
// failed copy is read again when all other copies have failed, since its drive may work again.
Reader::Copy* Reader::usable_copy(const Piece& piece, const Drive* drive) {
  auto& copies = piece.file->copies;
  const auto untried = [&](const Copy& copy) { return !(piece.tried & copy.bit); };
  const bool in_use =
      std::ranges::any_of(copies, [&](const Copy& copy) { return untried(copy) && !copy.given_up; });
  for (Copy& copy : copies)
    if (untried(copy) && copy.given_up != in_use && (!drive || copy.drive == drive)) return &copy;
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
      queue.pop_front();  // the drive's copy was given up; another drive has one
    }
  }
  return {};
}

void Reader::work(Drive& drive) {
  Bounce bounce;
  Lock lock(mutex_);
  for (;;) {
    Task task;
    drive.wake.wait(lock, [&] { return stop_ || (task = take(drive)); });
    if (stop_) return;
    run(task, bounce, lock);
  }
}

void Reader::run(const Task& task, Bounce& bounce, Lock& lock) {
  const Piece& piece = *task.piece;
  Drive& drive = *task.copy->drive;
  const bool prefetch = piece.job->prefetch;
  drive.begin(prefetch);
  lock.unlock();
  auto failure = task.copy->file->read(piece.target, piece.offset, piece.nbytes, bounce);
  lock.lock();
  drive.end(prefetch, failure ? 0 : piece.nbytes);
  end_piece(task, std::move(failure), lock);
}

// A small piece that the waiting thread reads itself: that is faster than waking another thread. Large pieces
// are left to the drive's threads, since the waiting thread could not check for signals meanwhile.
Reader::Task Reader::take_own(Job& job) {
  for (Piece& piece : job.pieces) {
    if (!piece.queued || piece.nbytes > kSmall) continue;
    withdraw(piece);
    return {&piece, usable_copy(piece, nullptr)};
  }
  return {};
}

void Reader::end_piece(const Task& task, std::optional<ReadFailure> failure, Lock& lock) {
  Job& job = *task.piece->job;
  if (failure && !job.failure && !job.cancelled && try_another_copy(task, *failure)) return;
  if (failure) {
    fail(job, *failure);
  } else {
    job.bytes_read += task.piece->nbytes;
    task.piece->source = task.copy->bit;
  }
  if (job.unfinished == 1 && job.checksum && !job.failure && !job.cancelled) compare_checksum(job, lock);
  if (--job.unfinished == 0) finished_.notify_all();
}

bool Reader::try_another_copy(const Task& task, const ReadFailure& failure) {
  Piece& piece = *task.piece;
  piece.tried |= task.copy->bit;
  if (!usable_copy(piece, nullptr)) return false;
  give_up(*task.copy, *piece.file, failure);
  enqueue(piece, true);
  return true;
}

void Reader::give_up(Copy& copy, const File& file, const ReadFailure& failure) {
  const bool others =
      std::ranges::any_of(file.copies, [&](const Copy& other) { return &other != &copy && !other.given_up; });
  if (!others || copy.given_up) return;
  given_up_.push_back(failure);
  copy.given_up = true;
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

// Called when all pieces are read: no other thread uses the job or its target then.
void Reader::compare_checksum(Job& job, Lock& lock) {
  lock.unlock();
  const bool right = xxh3_64(job.target, job.nbytes) == *job.checksum;
  lock.lock();
  if (right || job.failure || job.cancelled) return;
  const Piece& first = job.pieces.front();
  Copy& copy = first.file->copies[std::countr_zero(first.source)];
  const ReadFailure failure{ReadFailure::Kind::checksum, copy.file->path(), first.offset};
  if (std::ranges::all_of(job.pieces, [&](const Piece& piece) {
        return piece.file == first.file && piece.source == first.source;
      }))
    give_up(copy, *first.file, failure);
  if (!read_next_copy(job)) fail(job, failure);
}

// Begins to read all pieces from the next copy that has not been read as a whole; false if none is left.
// Where pieces came from several copies, a wrong checksum does not tell which copy is damaged.
bool Reader::read_next_copy(Job& job) {
  const auto copies = [](const Piece& piece) { return piece.file->copies.size(); };
  const std::size_t most = std::ranges::max(job.pieces, {}, copies).file->copies.size();
  while (job.next_copy < most) {
    const std::size_t copy = job.next_copy++;
    if (std::ranges::all_of(job.pieces, [&](const Piece& p) { return p.source == p.bit_of(copy); })) continue;
    job.unfinished += job.pieces.size();
    for (Piece& piece : job.pieces) {
      piece.tried = ~piece.bit_of(copy);
      enqueue(piece, true);
    }
    return true;
  }
  return false;
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
  thread_local Bounce bounce;
  while (const Task task = take_own(job)) run(task, bounce, lock);
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
