#include "device/cuda_copier.h"

#include <dlfcn.h>

namespace moebox {
namespace {

constexpr int kSuccess = 0, kNotReady = 600;

// The driver's functions that the copier calls, with the prototypes of cuda.h.
struct Driver {
  int (*cuCtxGetCurrent)(void** context);
  int (*cuCtxSetCurrent)(void* context);
  int (*cuMemcpyHtoDAsync)(std::uint64_t destination, const void* source, std::size_t bytes, void* stream);
  int (*cuMemcpyDtoHAsync)(void* destination, std::uint64_t source, std::size_t bytes, void* stream);
  int (*cuMemsetD8Async)(std::uint64_t destination, unsigned char value, std::size_t bytes, void* stream);
  int (*cuStreamSynchronize)(void* stream);
  int (*cuStreamQuery)(void* stream);
  int (*cuEventCreate)(void** event, unsigned flags);
  int (*cuEventRecord)(void* event, void* stream);
  int (*cuEventQuery)(void* event);
  int (*cuEventElapsedTime)(float* ms, void* begin, void* end);
  int (*cuEventDestroy)(void* event);
  int (*cuGetErrorString)(int result, const char** text);
};

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw DeviceFailure(std::string("libcuda.so.1 has no ") + name + "; the driver is too old");
}

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (!library) throw DeviceFailure(std::string("no CUDA driver: ") + dlerror());
  Driver driver;
  find(library, "cuCtxGetCurrent", driver.cuCtxGetCurrent);
  find(library, "cuCtxSetCurrent", driver.cuCtxSetCurrent);
  find(library, "cuMemcpyHtoDAsync_v2", driver.cuMemcpyHtoDAsync);
  find(library, "cuMemcpyDtoHAsync_v2", driver.cuMemcpyDtoHAsync);
  find(library, "cuMemsetD8Async", driver.cuMemsetD8Async);
  find(library, "cuStreamSynchronize", driver.cuStreamSynchronize);
  find(library, "cuStreamQuery", driver.cuStreamQuery);
  find(library, "cuEventCreate", driver.cuEventCreate);
  find(library, "cuEventRecord", driver.cuEventRecord);
  find(library, "cuEventQuery", driver.cuEventQuery);
  find(library, "cuEventElapsedTime", driver.cuEventElapsedTime);
  find(library, "cuEventDestroy_v2", driver.cuEventDestroy);
  find(library, "cuGetErrorString", driver.cuGetErrorString);
  return driver;
}

const Driver& driver() {
  static const Driver instance = open_driver();
  return instance;
}

std::string describe(int result, const char* what) {
  const char* text = nullptr;
  driver().cuGetErrorString(result, &text);
  return std::string(what) + ": CUDA error " + std::to_string(result) + ", " + (text ? text : "unknown");
}

}  // namespace

CudaCopier::CudaCopier(std::uintptr_t upload_stream, std::uintptr_t download_stream)
    : up_(reinterpret_cast<void*>(upload_stream)), down_(reinterpret_cast<void*>(download_stream)) {
  expect(driver().cuCtxGetCurrent(&context_), "finding the device");
  if (!context_) throw DeviceFailure("no CUDA context on this thread; use the device once before");
}

CudaCopier::~CudaCopier() {
  for (void* event : events_) driver().cuEventDestroy(event);
}

void CudaCopier::expect(int result, const char* what) {
  if (result == kSuccess) return;
  if (!error_) error_ = describe(result, what);
  throw DeviceFailure(*error_);
}

void CudaCopier::attach() { expect(driver().cuCtxSetCurrent(context_), "choosing the device"); }

void CudaCopier::upload(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) {
  expect(driver().cuMemcpyHtoDAsync(destination, reinterpret_cast<const void*>(source), bytes, up_),
         "queueing an upload");
}

void CudaCopier::download(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes) {
  expect(driver().cuMemcpyDtoHAsync(reinterpret_cast<void*>(destination), source, bytes, down_),
         "queueing a download");
}

void CudaCopier::signal(std::uintptr_t flag, std::uintptr_t one) { upload(flag, one, sizeof(std::int32_t)); }

void CudaCopier::clear(std::uintptr_t destination, std::size_t bytes) {
  expect(driver().cuMemsetD8Async(destination, 0, bytes, up_), "clearing device memory");
  expect(driver().cuStreamSynchronize(up_), "clearing device memory");
}

void CudaCopier::synchronize() {
  expect(driver().cuStreamSynchronize(up_), "uploading");
  expect(driver().cuStreamSynchronize(down_), "downloading");
}

std::optional<std::string> CudaCopier::error() {
  for (void* stream : {up_, down_}) {
    const int result = driver().cuStreamQuery(stream);
    if (!error_ && result != kSuccess && result != kNotReady) error_ = describe(result, "copying");
  }
  return error_;
}

Copier::Mark CudaCopier::mark(Way way) {
  if (free_.empty()) {
    void* event = nullptr;
    expect(driver().cuEventCreate(&event, 0), "creating an event");
    free_.push_back(static_cast<Mark>(events_.size()));
    events_.push_back(event);
  }
  const Mark mark = free_.back();
  free_.pop_back();
  expect(driver().cuEventRecord(events_[mark], stream(way)), "recording an event");
  return mark;
}

bool CudaCopier::reached(Mark mark) {
  const int result = driver().cuEventQuery(events_[mark]);
  if (result != kNotReady) expect(result, "copying");
  return result == kSuccess;
}

double CudaCopier::seconds(Mark begin, Mark end) {
  float ms = 0;
  expect(driver().cuEventElapsedTime(&ms, events_[begin], events_[end]), "timing the uploads");
  return ms * 1e-3;
}

}  // namespace moebox
