// The copier of a CUDA device. It loads the driver at run time, so the build needs neither CUDA's headers nor
// its libraries.
#pragma once

#include <vector>

#include "device/copier.h"

namespace moebox {

class CudaCopier : public Copier {
 public:
  // The streams are raw handles of the current context. Throws DeviceFailure without a driver or a context.
  CudaCopier(std::uintptr_t upload_stream, std::uintptr_t download_stream);
  ~CudaCopier() override;
  CudaCopier(const CudaCopier&) = delete;
  CudaCopier& operator=(const CudaCopier&) = delete;

  void attach() override;
  void upload(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) override;
  void download(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) override;
  void signal(std::uintptr_t flag, std::uintptr_t one) override;
  void clear(std::uintptr_t destination, std::size_t bytes) override;
  void synchronize() override;
  std::optional<std::string> error() override;
  Mark mark(Way way) override;
  bool reached(Mark mark) override;
  double seconds(Mark begin, Mark end) override;
  void drop(Mark mark) override { free_.push_back(mark); }

 private:
  void* stream(Way way) const { return way == Way::up ? up_ : down_; }
  void expect(int result, const char* what);

  void *const up_, *const down_;
  void* context_ = nullptr;
  std::vector<void*> events_;  // by mark
  std::vector<Mark> free_;
  std::optional<std::string> error_;
};

}  // namespace moebox
