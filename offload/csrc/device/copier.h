// Copies between host and device: two queues, one of uploads and signals, one of downloads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace moebox {

// A copy failed, or the device does not answer.
class DeviceFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Addresses are integers, since the host cannot use those of a device. One thread at a time may use a copier.
class Copier {
 public:
  // A point in one of the two queues, until drop().
  using Mark = std::uint32_t;
  enum class Way { up, down };

  virtual ~Copier() = default;
  // To be called first on a thread that may not have used the device yet.
  virtual void attach() {}

  // These queue a copy and return. They throw DeviceFailure.
  virtual void upload(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) = 0;
  virtual void download(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) = 0;
  // Queues a copy of the int32 at `one` to `flag`, behind the uploads so far.
  virtual void signal(std::uintptr_t flag, std::uintptr_t one) = 0;

  // Zeroes device memory, behind the uploads so far, and waits for it.
  virtual void clear(std::uintptr_t destination, std::size_t bytes) = 0;
  // Waits for both queues.
  virtual void synchronize() = 0;
  // The first failure, or nullopt.
  virtual std::optional<std::string> error() = 0;

  // Queues a mark behind the copies so far.
  virtual Mark mark(Way way) = 0;
  virtual bool reached(Mark mark) = 0;
  // Time between two marks that have been reached, by the device's clock.
  virtual double seconds(Mark begin, Mark end) = 0;
  virtual void drop(Mark mark) = 0;
};

}  // namespace moebox
