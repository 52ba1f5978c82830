// Copies between host and device in two orders of their own: uploads, with signals among them, and downloads.
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

// Addresses are integers: a device's mean nothing here. Used by one thread at a time.
class Copier {
 public:
  // A point in one of the two orders; to be dropped.
  using Mark = std::uint32_t;
  enum class Way { up, down };

  virtual ~Copier() = default;
  // Before other calls from a thread that may not have used the device.
  virtual void attach() {}

  // These queue and return; they throw DeviceFailure.
  virtual void upload(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) = 0;
  virtual void download(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) = 0;
  // Copies the int32 `one` to `flag` after the uploads so far.
  virtual void signal(std::uintptr_t flag, std::uintptr_t one) = 0;

  // Zeroes device memory after the uploads so far; done on return.
  virtual void clear(std::uintptr_t destination, std::size_t bytes) = 0;
  virtual void synchronize() = 0;
  // What failed, if something did; sticks.
  virtual std::optional<std::string> error() = 0;

  virtual Mark mark(Way way) = 0;
  virtual bool reached(Mark mark) = 0;
  // Between two marks that have been reached, by the device's clock.
  virtual double seconds(Mark begin, Mark end) = 0;
  virtual void drop(Mark mark) = 0;
};

}  // namespace moebox
