#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "sizes.h"

namespace moebox {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPausesPerClockRead = 32;

// Waits for ready() for kSpin at most; returns whether it became true.
template <class Ready>
bool spin(Ready&& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// CPUs that the cgroup allows, quota / period: v2 has both in cpu.max, v1 has a file for each.
std::optional<double> cgroup_quota() {
  std::string quota, period;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period) {
  } else {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  const double used = std::atof(quota.c_str()), of = std::atof(period.c_str());
  if (used <= 0 || of <= 0) return std::nullopt;  // "max", "-1", or no such file
  return used / of;
}

void pin_to(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
}

}  // namespace

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  if (cpus.empty()) cpus.push_back(0);
  if (const auto quota = cgroup_quota())
    cpus.resize(std::clamp<std::size_t>(std::ceil(*quota), 1, cpus.size()));
  return cpus;
}

std::byte* Arena::reserve(std::size_t bytes) {
  if (storage_.size() < bytes + kCacheLine) {
    storage_ = {};  // free the old block first: the two need not exist at once
    storage_.resize(bytes + kCacheLine);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
  return storage_.data() + (kCacheLine - address % kCacheLine) % kCacheLine;
}

ThreadPool::ThreadPool(std::optional<int> threads, bool pin) : owner_(getpid()) {
  const auto cpus = allowed_cpus();
  const int count = threads.value_or(static_cast<int>(cpus.size()));
  if (count < 1)
    throw std::invalid_argument("threads: " + std::to_string(count) + " given, at least 1 needed");
  for (int worker = 1; worker < count; ++worker) {
    workers_.emplace_back([this, worker] { work(worker); });
    if (pin) pin_to(workers_.back(), cpus[worker % cpus.size()]);
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_) {
    // A forked child has the handles but not the threads; joining would wait for ever.
    for (auto& worker : workers_) worker.detach();
    return;
  }
  stop_ = true;
  ++round_;
  round_.notify_all();
  for (auto& worker : workers_) worker.join();
}

ThreadPool::Lease::Lease(ThreadPool& pool) : pool_(pool) {
  if (getpid() != pool.owner_)
    throw std::runtime_error(
        "ThreadPool: made before fork(), its threads do not exist in this process; make one here");
  lock_ = std::unique_lock(pool.mutex_);
}

ThreadPool::Awake::Awake(Lease& lease) : pool_(lease.pool_) {
  ++pool_.awake_;
  lease.run(lease.size(), [](std::size_t, int) {});  // wakes workers that sleep
}

void ThreadPool::run(std::size_t tasks, void* context, Call call, const std::function<void()>& on_start) {
  context_ = context;
  call_ = call;
  tasks_ = tasks;
  next_ = 0;
  if (tasks <= 1 || workers_.empty()) {
    keep_error(on_start);
    take_tasks(0);  // one task at most, or no workers: wake none
  } else {
    run_with_workers(on_start);
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::run_with_workers(const std::function<void()>& on_start) {
  busy_ = static_cast<int>(workers_.size());
  ++round_;
  round_.notify_all();
  keep_error(on_start);
  take_tasks(0);
  while (!spin([this] { return busy_ == 0; })) std::this_thread::yield();
}

void ThreadPool::take_tasks(int worker) {
  keep_error([this, worker] {
    for (std::size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
      call_(context_, task, worker);
  });
}

// Calls work(); the first exception of a round is kept for run(), and no more tasks start.
void ThreadPool::keep_error(const std::function<void()>& work) {
  try {
    if (work) work();
  } catch (...) {
    next_ = tasks_;
    const std::lock_guard guard(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

// Whether there is a new round; false when the pool ends.
bool ThreadPool::wait_for_round(std::uint32_t seen) {
  while (!spin([&] { return round_ != seen; })) {
    if (awake_ == 0) {
      round_.wait(seen);
      break;
    }
    std::this_thread::yield();  // to another thread that waits for this CPU
  }
  return !stop_;
}

void ThreadPool::work(int worker) {
  for (std::uint32_t seen = 0; wait_for_round(seen); ++seen) {
    take_tasks(worker);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace moebox
