// A pool of threads that share the work of a call: numbered tasks. The calling thread takes tasks, too.
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

// Tells the CPU that the loop around it only waits.
inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Scratch memory that is kept between calls and grows to the largest request. It starts on a cache line.
class Arena {
 public:
  std::byte* reserve(std::size_t bytes);

 private:
  std::vector<std::byte> storage_;
};

class ThreadPool {
 public:
  // `threads` counts the calling thread; nullopt means one per allowed CPU. With `pin`, worker i stays on
  // allowed CPU i (modulo their number); the calling thread's affinity does not change.
  explicit ThreadPool(std::optional<int> threads, bool pin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  class Awake;

  // The exclusive right to call run() and to use the pool's scratch memory.
  class Lease {
   public:
    explicit Lease(ThreadPool& pool);

    int size() const { return pool_.size(); }
    std::byte* scratch(std::size_t bytes) { return pool_.arena_.reserve(bytes); }

    // Calls body(task, worker) for each task in [0, tasks), with worker in [0, size()), and returns when all
    // tasks are done. After the first exception no more tasks start; run() throws it again. A body must not
    // call run(). The calling thread calls `on_start`, if there is one, when the workers have been woken and
    // before it takes tasks itself.
    template <class Body>
    void run(std::size_t tasks, Body&& body, const std::function<void()>& on_start = {}) {
      const auto call = [](void* context, std::size_t task, int worker) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(task, worker);
      };
      pool_.run(tasks, &body, call, on_start);
    }

   private:
    friend class Awake;
    ThreadPool& pool_;
    std::unique_lock<std::mutex> lock_;
  };

  // While an Awake exists, workers wait for the next round without sleeping: waking one takes 50 us.
  class Awake {
   public:
    explicit Awake(Lease& lease);
    ~Awake() { --pool_.awake_; }
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    ThreadPool& pool_;
  };

 private:
  using Call = void (*)(void* context, std::size_t task, int worker);

  void run(std::size_t tasks, void* context, Call call, const std::function<void()>& on_start);
  void run_with_workers(const std::function<void()>& on_start);
  void keep_error(const std::function<void()>& work);
  void work(int worker);
  void take_tasks(int worker);
  bool wait_for_round(std::uint32_t seen);

  const pid_t owner_;  // the process that has the threads
  std::mutex mutex_;
  Arena arena_;

  // The round in progress: run() writes these before it increments `round_`.
  void* context_ = nullptr;
  Call call_ = nullptr;
  std::size_t tasks_ = 0;
  std::exception_ptr error_;
  std::mutex error_mutex_;

  alignas(64) std::atomic<std::uint32_t> round_{0};
  alignas(64) std::atomic<std::size_t> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> awake_{0};
  std::vector<std::thread> workers_;
};

}  // namespace moebox
