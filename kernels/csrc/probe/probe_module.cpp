// Python bindings: read_bandwidth and peak_gflops.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <vector>

#include "arrays.h"
#include "module.h"
#include "pool.h"
#include "probe/probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

constexpr std::size_t kPiece = 128 << 10;  // bytes of a task

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Piece {
  const std::uint8_t* at;
  std::size_t bytes;
};

double read_bandwidth(ThreadPool& pool, const nb::sequence& arrays, const std::optional<std::string>& isa) {
  std::vector<Array> owners;
  std::vector<Piece> pieces;
  std::size_t total = 0;
  for (const nb::handle item : arrays) {
    const Array& array = owners.emplace_back(nb::cast<Array>(item));
    check_memory(array, "arrays");
    const auto* data = elements<std::uint8_t>(array);
    total += array.nbytes();
    for (std::size_t i = 0; i < array.nbytes(); i += kPiece)
      pieces.push_back({data + i, std::min(kPiece, array.nbytes() - i)});
  }
  const Probe& probe = MOEBOX_TABLE(kProbe, choose_isa(isa));
  const nb::gil_scoped_release unlocked;
  ThreadPool::Lease lease(pool);
  std::atomic<std::uint64_t> used = 0;
  const auto start = std::chrono::steady_clock::now();
  lease.run(pieces.size(), [&](std::size_t i, int) { used += probe.read(pieces[i].at, pieces[i].bytes); });
  return static_cast<double>(total) / seconds_since(start) / 1e9;
}

double peak_gflops(ThreadPool& pool, const std::optional<std::string>& isa) {
  const Probe& probe = MOEBOX_TABLE(kProbe, choose_isa(isa));
  constexpr std::size_t kRounds = 100'000, kTasksPerWorker = 20;
  const nb::gil_scoped_release unlocked;
  ThreadPool::Lease lease(pool);
  const std::size_t tasks = kTasksPerWorker * lease.size();
  const auto start = std::chrono::steady_clock::now();
  lease.run(tasks, [&](std::size_t, int) { probe.multiply(kRounds); });
  return probe.flops_per_round * kRounds * tasks / seconds_since(start) / 1e9;
}

}  // namespace

void register_probes(nb::module_& m) {
  m.def("read_bandwidth", read_bandwidth, "pool"_a, "arrays"_a, "isa"_a = nb::none());
  m.def("peak_gflops", peak_gflops, "pool"_a, "isa"_a = nb::none());
}

}  // namespace moebox
