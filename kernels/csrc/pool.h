// Threads that share out numbered tasks. The caller is one of them.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

namespace moebox {

// CPUs this process may use: the affinity mask, cut to the cgroup's quota (rounded up).
std::vector<int> allowed_cpus();

// Tells the CPU that this is a loop that waits.
inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Memory that grows, stays, and starts on a cache line.
class Arena {
 public:
  std::byte* reserve(std::size_t bytes);

 private:
  std::vector<std::byte> storage_;
};

class ThreadPool {
 public:
  // `threads` counts the caller; nullopt means one per allowed CPU. With `pin`, worker i stays on allowed
  // CPU i (modulo their number); the caller's own affinity is left alone.
  explicit ThreadPool(std::optional<int> threads, bool pin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  class Hot;

  // Exclusive use for a series of run() calls and of the scratch memory that stays with the pool.
  class Lease {
   public:
    explicit Lease(ThreadPool& pool);

    int size() const { return pool_.size(); }
    std::byte* scratch(std::size_t bytes) { return pool_.arena_.reserve(bytes); }

    // Calls body(task, worker) for each task in [0, tasks), worker in [0, size()), and returns when all
    // are done. The first exception stops the handing out of tasks and is rethrown here. No nesting.
    // The caller calls `first`, if there is one, when the others have begun and before it joins them.
    template <class Body>
    void run(std::size_t tasks, Body&& body, const std::function<void()>& first = {}) {
      const auto call = [](void* context, std::size_t task, int worker) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(task, worker);
      };
      pool_.run(tasks, &body, call, first);
    }

   private:
    friend class Hot;
    ThreadPool& pool_;
    std::unique_lock<std::mutex> lock_;
  };

  // While one lives, workers wait for the next round without ever sleeping: waking one takes 50 us.
  class Hot {
   public:
    explicit Hot(Lease& lease);
    ~Hot() { --pool_.hot_; }
    Hot(const Hot&) = delete;
    Hot& operator=(const Hot&) = delete;

   private:
    ThreadPool& pool_;
  };

 private:
  using Call = void (*)(void* context, std::size_t task, int worker);

  void run(std::size_t tasks, void* context, Call call, const std::function<void()>& first);
  void share_round(const std::function<void()>& first);
  void guarded(const std::function<void()>& part);
  void work(int worker);
  void take_tasks(int worker);
  bool wait_for_round(std::uint32_t seen);

  const pid_t owner_;
  std::mutex mutex_;
  Arena arena_;

  // The round in progress: written by run() before `round_` moves on.
  void* context_ = nullptr;
  Call call_ = nullptr;
  std::size_t tasks_ = 0;
  std::exception_ptr error_;
  std::mutex error_mutex_;

  alignas(64) std::atomic<std::uint32_t> round_{0};
  alignas(64) std::atomic<std::size_t> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> hot_{0};
  std::vector<std::thread> workers_;
};

}  // namespace moebox
