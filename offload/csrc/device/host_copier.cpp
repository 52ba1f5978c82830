#include "device/host_copier.h"

#include <cstring>
#include <utility>

namespace moebox {

Lane::Lane(std::uint64_t seed, double max_delay_us)
    : random_(seed), max_delay_us_(max_delay_us), thread_([this] { work(); }) {}

Lane::~Lane() {
  {
    const std::lock_guard guard(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Lane::push(std::function<void()> task) {
  {
    const std::lock_guard guard(mutex_);
    tasks_.push_back(std::move(task));
  }
  changed_.notify_all();
}

void Lane::wait_until_idle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return tasks_.empty() && !busy_; });
}

void Lane::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
    if (stop_) return;
    const auto task = std::move(tasks_.front());
    tasks_.pop_front();
    busy_ = true;
    lock.unlock();
    delay();
    task();
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

void Lane::delay() {
  if (max_delay_us_ <= 0) return;
  const double us = std::uniform_real_distribution(0.0, max_delay_us_)(random_);
  std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(us));
}

HostCopier::HostCopier(std::uint64_t seed, double max_delay_us)
    : up_(seed, max_delay_us), down_(seed + 1, max_delay_us) {}

void HostCopier::copy(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) {
  if (until_failure_ >= 0 && until_failure_-- == 0) failed_ = true;
  if (failed_) return;
  std::memcpy(reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes);
}

void HostCopier::upload(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) {
  up_.push([=, this] { copy(destination, source, bytes); });
}

void HostCopier::download(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) {
  down_.push([=, this] { copy(destination, source, bytes); });
}

void HostCopier::signal(std::uintptr_t flag, std::uintptr_t one) {
  up_.push([=] {
    const auto value = *reinterpret_cast<const std::int32_t*>(one);
    std::atomic_ref(*reinterpret_cast<std::int32_t*>(flag)).store(value, std::memory_order_release);
  });
}

void HostCopier::clear(std::uintptr_t destination, std::size_t bytes) {
  up_.push([=] { std::memset(reinterpret_cast<void*>(destination), 0, bytes); });
  up_.wait_until_idle();
}

void HostCopier::synchronize() {
  up_.wait_until_idle();
  down_.wait_until_idle();
}

std::optional<std::string> HostCopier::error() {
  if (!failed_) return std::nullopt;
  return "a copy of the stand-in device failed, as it was told to";
}

Copier::Mark HostCopier::mark(Way way) {
  const Mark mark = next_mark_++;
  (way == Way::up ? up_ : down_).push([=, this] {
    const std::lock_guard guard(marks_mutex_);
    marks_[mark] = std::chrono::steady_clock::now();
  });
  return mark;
}

bool HostCopier::reached(Mark mark) {
  const std::lock_guard guard(marks_mutex_);
  return marks_.contains(mark);
}

double HostCopier::seconds(Mark begin, Mark end) {
  const std::lock_guard guard(marks_mutex_);
  return std::chrono::duration<double>(marks_.at(end) - marks_.at(begin)).count();
}

void HostCopier::drop(Mark mark) {
  const std::lock_guard guard(marks_mutex_);
  marks_.erase(mark);
}

}  // namespace moebox
