// The copier of the stand-in device, whose memory is the host's.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>

#include "device/copier.h"

namespace moebox {

// A thread that runs tasks in order, each after a random delay.
class Lane {
 public:
  Lane(std::uint64_t seed, double max_delay_us);
  ~Lane();

  void push(std::function<void()> task);
  void wait_until_idle();

 private:
  void work();
  void delay();

  std::mt19937_64 random_;
  const double max_delay_us_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool busy_ = false, stop_ = false;
  std::thread thread_;
};

// Has one lane for each direction. After a failure it skips copies, but neither signals nor marks.
class HostCopier : public Copier {
 public:
  HostCopier(std::uint64_t seed, double max_delay_us);

  void upload(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) override;
  void download(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) override;
  void signal(std::uintptr_t flag, std::uintptr_t one) override;
  void clear(std::uintptr_t destination, std::size_t bytes) override;
  void synchronize() override;
  std::optional<std::string> error() override;
  Mark mark(Way way) override;
  bool reached(Mark mark) override;
  double seconds(Mark begin, Mark end) override;
  void drop(Mark mark) override;

  // For tests: after so many more copies one fails.
  void fail_after(std::int64_t copies) { until_failure_ = copies; }

 private:
  using Time = std::chrono::steady_clock::time_point;

  void copy(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes);

  std::atomic<std::int64_t> until_failure_{-1};
  std::atomic<bool> failed_{false};
  std::mutex marks_mutex_;
  Mark next_mark_ = 0;
  std::unordered_map<Mark, Time> marks_;  // marks that have been reached
  Lane up_, down_;                        // last: their threads use the members above
};

}  // namespace moebox
