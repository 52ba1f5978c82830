#include "decode/road_split.h"

#include <algorithm>

#include "experts/experts.h"

namespace moebox {
namespace {

// Speed of a GPU kernel that reads RAM over PCIe, relative to the copy engine.
constexpr double kKernelReadRate = 0.9;
// Each road gets at least 1/8 of a split expert's rows: fewer are not worth a launch on the GPU, and where
// the GPU would read nearly all, a whole upload also puts the expert into the cache.
constexpr std::size_t kSmallestShare = 8;
// An upload puts the expert into the cache, a split does not: a split must save more than 5 % of the time.
constexpr double kWorthSplitting = 0.95;

}  // namespace

void LiveRate::set(double gbps) {
  constexpr double kWeight = 0.02;  // seconds of measurement that the value counts as
  seconds_ = kWeight;
  bytes_ = gbps * 1e9 * kWeight;
}

void LiveRate::add(double bytes, double seconds) {
  constexpr double kKeep = 0.98, kOutlier = 4;
  if (!(seconds > 0)) return;
  const double expected = bytes * seconds_ / bytes_;
  bytes_ = bytes_ * kKeep + bytes;
  seconds_ = seconds_ * kKeep + std::clamp(seconds, expected / kOutlier, expected * kOutlier);
}

double Misses::remaining(std::size_t uploads) const {
  double experts = static_cast<double>(uploads);
  for (std::size_t i = 0; i < std::min(uploads, uploaded_ahead.size()); ++i) experts -= uploaded_ahead[i];
  return experts;
}

std::size_t split_whole_experts(const Misses& misses, const RoadRates& rates) {
  const auto duration = [&](std::size_t q) {
    return std::max(misses.remaining(q) / rates.pcie_gbps, (misses.n - q) / rates.cpu_gbps);
  };
  std::size_t best = 0;
  for (std::size_t q = 1; q <= std::min(misses.n, misses.max_uploads); ++q)
    if (duration(q) < duration(best)) best = q;
  return best;
}

// With q whole uploads and a share p of the next expert on the GPU, the layer takes
//   max((remaining(q) + p / kKernelReadRate) / pcie, (n - q - p) / cpu).
// For each q, p is where both terms are equal, rounded to whole groups of inner rows.
RoadSplit split_misses(const Misses& misses, std::size_t inner, const RoadRates& rates) {
  const auto [pcie_gbps, cpu_gbps] = rates;
  const auto duration = [&](std::size_t q, double share) {
    return std::max((misses.remaining(q) + share / kKernelReadRate) / rates.pcie_gbps,
                    (misses.n - q - share) / rates.cpu_gbps);
  };
  RoadSplit best{split_whole_experts(misses, rates), 0};
  double shortest = duration(best.uploads, 0) * kWorthSplitting;
  for (std::size_t q = 0; q <= misses.max_uploads && q < misses.n; ++q) {
    const double share = ((misses.n - q) * pcie_gbps - misses.remaining(q) * cpu_gbps) /
                         (cpu_gbps / kKernelReadRate + pcie_gbps);
    if (share <= 0) break;
    const auto rows = static_cast<std::size_t>(share * static_cast<double>(inner) / kGroup + 0.5) * kGroup;
    if (rows < std::max(inner / kSmallestShare, kGroup) || rows + inner / kSmallestShare > inner ||
        rows >= inner)
      continue;
    const double seconds = duration(q, static_cast<double>(rows) / static_cast<double>(inner));
    if (seconds >= shortest) continue;
    shortest = seconds;
    best = {q, rows};
  }
  return best;
}

}  // namespace moebox
