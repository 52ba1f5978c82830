// How a layer's misses are split between the two roads: uploads to the GPU over PCIe, and the CPU.
#pragma once

#include <cstddef>
#include <span>

namespace moebox {

// GB/s of bytes over seconds; older measurements count less.
class LiveRate {
 public:
  explicit LiveRate(double gbps) { set(gbps); }
  void set(double gbps);
  double gbps() const { return bytes_ / seconds_ * 1e-9; }
  void add(double bytes, double seconds);

 private:
  double bytes_, seconds_;
};

struct RoadRates {
  double pcie_gbps, cpu_gbps;
};

// A layer's experts in RAM that are not on the GPU. The first of them have been uploaded in part before the
// layer was routed: uploaded_ahead[i] is that share of expert i, from 0 to 1.
struct Misses {
  std::size_t n, max_uploads;
  std::span<const double> uploaded_ahead;

  // Experts' worth of bytes that still have to cross PCIe if the first `uploads` misses are uploaded.
  double remaining(std::size_t uploads) const;
};

// The first `uploads` misses go to the GPU as a whole. Of the next one the GPU reads the first `split_rows`
// inner rows from RAM while it computes them. The CPU computes the rest.
struct RoadSplit {
  std::size_t uploads = 0, split_rows = 0;
};

// The number q of whole uploads that minimises max(remaining(q) / pcie, (n - q) / cpu).
std::size_t split_whole_experts(const Misses& misses, const RoadRates& rates);

// The same, with one expert of `inner` rows split where that takes clearly less time.
RoadSplit split_misses(const Misses& misses, std::size_t inner, const RoadRates& rates);

}  // namespace moebox
