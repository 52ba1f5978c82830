// The host's side of a decode step: see offload/decode/host_step.py.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "decode/cold_rows.h"
#include "decode/slot_eviction.h"
#include "decode/upload_ahead.h"
#include "device/copier.h"
#include "experts/experts_one.h"
#include "pool.h"
#include "residency/residency.h"

namespace moebox {

constexpr std::size_t kFlagWords = 16;  // a flag has a cache line of its own

// What GPU and host share, in pinned memory: arrays of L layers, k chosen experts, H hidden_size.
struct Mailbox {
  std::int32_t *routed, *listed, *summed;  // [L, 16]
  const std::int32_t* ids;                 // [L, k]
  const float* weights;                    // [L, k]
  std::int32_t* hits;                      // [L, 1 + k]: a count, then slots
  float* hit_weights;                      // [L, k]
  std::int32_t* uploads;                   // [L, 1 + k]
  float* upload_weights;                   // [L, k]
  std::int32_t* part;                      // [L, 4]: a row in RAM or -1, and how many inner rows of it
  float* part_weight;                      // [L, 1]
  const std::uint16_t* hidden;             // bf16 [L, H]
  float* sums;                             // [L, H]
  std::uintptr_t uploaded;                 // device int32, one every uploaded_stride bytes
  std::size_t uploaded_stride;
  std::uintptr_t one;
};

// What the GPU guesses of a layer while it computes the one before, in pinned memory: nothing of the first.
struct Guesses {
  std::int32_t* flags = nullptr;      // [L, 16]; null: the GPU guesses nothing
  const std::int32_t* ids = nullptr;  // [L, n], the likeliest first
  std::size_t n = 0;
};

struct RoadShape {
  std::size_t layers, n_experts, top_k, hidden, inner;
};

// GB/s of bytes over seconds, the older the less.
class LiveRate {
 public:
  explicit LiveRate(double gbps) { set(gbps); }
  void set(double gbps);
  double gbps() const { return bytes_ / seconds_ * 1e-9; }
  void add(double bytes, double seconds);

 private:
  double bytes_, seconds_;
};

struct LayerStats {
  static constexpr std::array kFields = {"hits",   "uploads",  "part",       "cpu",   "cold",
                                         "wait_s", "listed_s", "schedule_s", "cpu_s", "upload_s",
                                         "read_s", "layer_s",  "early",      "wasted"};
  double hits = 0, uploads = 0, part = 0, cpu = 0, cold = 0, wait_s = 0, listed_s = 0, schedule_s = 0,
         cpu_s = 0, upload_s = 0, read_s = 0, layer_s = 0, early = 0, wasted = 0;
};
static_assert(sizeof(LayerStats) == LayerStats::kFields.size() * sizeof(double));

// How misses are shared: `uploads` whole experts, and of one more the first `part_rows` inner rows, which the
// GPU reads from RAM while it computes; the CPU has the rest.
struct Share {
  std::size_t uploads = 0, part_rows = 0;
};

// What a layer has to share out: of the first uploads some has been `early`, from 0 to 1 of an expert each.
struct Misses {
  std::size_t n, most;  // experts; how many may be uploaded
  std::span<const double> early;

  // What has to pass to the GPU yet for so many uploads.
  double left(std::size_t uploads) const;
};

// So many uploads that the longer of the two roads is shortest.
std::size_t split(const Misses& misses, double pcie_gbps, double cpu_gbps);

// The same, dividing an expert of `inner` rows where that is clearly shorter.
Share divide(const Misses& misses, std::size_t inner, double pcie_gbps, double cpu_gbps);

class DecodeRoads {
 public:
  DecodeRoads(ThreadPool& pool, Residency& residency, Copier& copier, const RoadShape& shape,
              const Mailbox& mailbox, const Stores& stores, bool exclusive, ColdTier* cold,
              const ExpertKernels& kernels, const Guesses& guesses);

  // `trace`: expert ids [L, k] to use instead of the mailbox's, or null; `guesses`: the same of its guesses.
  void run_token(const std::int32_t* trace, const std::int32_t* guesses, double timeout_s);
  void clear();
  void abort() { abort_ = true; }
  void settle();

  const RoadShape& shape() const { return shape_; }
  std::size_t n_guesses() const { return guesses_.n; }
  const std::vector<LayerStats>& stats() const { return stats_; }
  AheadUploads& ahead() { return ahead_; }
  LiveRate pcie{50}, cpu{50};

 private:
  using Clock = std::chrono::steady_clock;
  struct Pick {
    std::int32_t key, slot;
    float weight;
  };
  // Uploads of a layer whose time is not known yet.
  struct Timing {
    std::size_t layer;
    double bytes;
    Copier::Mark begin, end;
  };

  // The pool for as long as a token takes.
  struct Hands {
    explicit Hands(ThreadPool& pool) : lease(pool), hot(std::in_place, lease) {}
    ThreadPool::Lease lease;
    std::optional<ThreadPool::Awake> hot;
  };

  void run_layer(Hands& hands, std::size_t layer, const std::int32_t* ids, double timeout_s);
  void wait_routed(std::size_t layer, double timeout_s);
  void upload_ahead(std::size_t layer);
  void look_up(std::size_t layer, const std::int32_t* ids);
  void decide();
  Share share() const;
  void publish_lists(std::size_t layer);
  double part() const { return static_cast<double>(part_rows_) / static_cast<double>(shape_.inner); }
  void queue_uploads(std::size_t layer);
  void compute(ThreadPool::Lease& lease, std::size_t layer, Clock::time_point seen);
  void sum_on_cpu(ThreadPool::Lease& lease, std::size_t layer, const std::function<void()>& first);
  void read_cold(std::size_t layer);
  void compute_cold(Hands& hands, std::size_t layer);
  void learn_upload_times();
  void end_early(std::size_t from);
  void recover();

  ThreadPool& pool_;
  Residency& residency_;
  Copier& copier_;
  const RoadShape shape_;
  const Mailbox box_;
  const Guesses guesses_;
  const Stores stores_;
  const ExpertKernels& kernels_;
  ColdTier* const cold_tier_;  // null where every expert is in memory
  Turnover turnover_;
  AheadUploads ahead_;
  std::atomic<bool> abort_{false};

  std::vector<LayerStats> stats_;  // by layer
  std::deque<Timing> timings_;
  // The layer's chosen experts.
  std::vector<Pick> hits_, uploads_, cpu_, cold_;
  std::size_t part_rows_ = 0;  // of the last one in cpu_, that the GPU computes
  std::vector<std::int32_t> keys_, hit_keys_;
  const std::int32_t* guessed_ids_ = nullptr;  // the token's, [L, n]
  std::vector<std::int32_t> guessed_;
  std::vector<double> early_;
  std::vector<ExpertWeights> experts_;
  std::vector<float> weights_;
  Clock::time_point read_since_;
  std::vector<float> cold_sums_;  // [cold_.size(), H]
};

}  // namespace moebox
