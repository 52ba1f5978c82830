// The host's side of a decode step, which offload/decode/host_step.py describes.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "decode/cold_reader.h"
#include "decode/mailbox.h"
#include "decode/road_split.h"
#include "decode/slot_eviction.h"
#include "decode/upload_ahead.h"
#include "device/copier.h"
#include "experts/experts_one.h"
#include "pool.h"
#include "residency/residency.h"

namespace moebox {

struct ModelShape {
  std::size_t layers, n_experts, top_k, hidden, inner;  // MoE layers; inner: moe_intermediate_size
};

// A layer's figures; offload/decode/host_step.py says what they mean.
struct LayerStats {
  static constexpr std::array kFields = {"hits",   "uploads",  "part",       "cpu",   "cold",
                                         "wait_s", "listed_s", "schedule_s", "cpu_s", "upload_s",
                                         "read_s", "layer_s",  "early",      "wasted"};
  double hits = 0, uploads = 0, part = 0, cpu = 0, cold = 0, wait_s = 0, listed_s = 0, schedule_s = 0,
         cpu_s = 0, upload_s = 0, read_s = 0, layer_s = 0, early = 0, wasted = 0;
};
static_assert(sizeof(LayerStats) == LayerStats::kFields.size() * sizeof(double));

// Serves one token at a time. `rows`: null where every expert has a row of RAM. `cold`: null where RAM and
// the GPU hold all experts.
class HostStep {
 public:
  HostStep(ThreadPool& pool, Residency& residency, Copier& copier, const ModelShape& shape,
           const Mailbox& mailbox, const Stores& stores, RamRows* rows, ColdReader* cold,
           const ExpertKernels& kernels);

  // ids [L, k] and predicted_ids [L, n]: used instead of the mailbox's, unless null.
  void serve_token(const std::int32_t* ids, const std::int32_t* predicted_ids, double timeout_s);
  // Takes all flags of the mailbox down.
  void clear_flags();
  // Ends the token that is being served. From any thread.
  void abort() { abort_ = true; }
  // Waits for all copies, and makes the changes of residency that depend on them.
  void wait_for_copies();

  const ModelShape& shape() const { return shape_; }
  std::size_t n_predicted() const { return box_.predicted_ids.width; }
  const std::vector<LayerStats>& stats() const { return stats_; }
  UploadAhead& ahead() { return ahead_; }
  LiveRate pcie{50}, cpu{50};

 private:
  using Clock = std::chrono::steady_clock;
  struct Pick {
    std::int32_t key, slot;
    float weight;
  };
  // Uploads of a layer whose duration is not known yet.
  struct Timing {
    std::size_t layer;
    double bytes;
    Copier::Mark begin, end;
  };

  // The pool's threads, which do not sleep while a token is served unless the layer reads from disk.
  struct Workers {
    explicit Workers(ThreadPool& pool) : lease(pool), awake(std::in_place, lease) {}
    ThreadPool::Lease lease;
    std::optional<ThreadPool::Awake> awake;
  };

  void serve_layer(Workers& workers, std::size_t layer, const std::int32_t* ids, double timeout_s);
  void wait_until_routed(std::size_t layer, double timeout_s);
  void upload_ahead(std::size_t layer);
  void look_up(std::size_t layer, const std::int32_t* ids);
  void split();
  void order_misses();
  RoadSplit road_split() const;
  void place_upload(Pick& pick);
  void publish_slots(std::size_t layer);
  // The share of the split expert that the GPU computes; 0 if no expert is split.
  double split_share() const { return static_cast<double>(split_rows_) / static_cast<double>(shape_.inner); }
  void queue_copies(std::size_t layer);
  void queue_uploads(std::size_t layer);
  void compute(ThreadPool::Lease& lease, std::size_t layer, Clock::time_point seen);
  void sum_on_cpu(ThreadPool::Lease& lease, std::size_t layer, const std::function<void()>& on_start);
  void read_cold(std::size_t layer);
  void compute_cold(Workers& workers, std::size_t layer);
  void learn_upload_times();
  void let_program_end(std::size_t from);
  void recover();

  ThreadPool& pool_;
  Residency& residency_;
  Copier& copier_;
  const ModelShape shape_;
  const Mailbox box_;
  const Stores stores_;
  const ExpertKernels& kernels_;
  ColdReader* const cold_reader_;
  SlotEviction eviction_;
  UploadAhead ahead_;
  std::atomic<bool> abort_{false};

  std::vector<LayerStats> stats_;  // by layer
  std::deque<Timing> timings_;
  // The layer's picks, by where they are computed and from where: the last of cpu_ may be split.
  std::vector<Pick> hits_, uploads_, cpu_, cold_;
  std::size_t split_rows_ = 0;  // inner rows of the split expert that the GPU computes
  std::vector<std::int32_t> keys_, hit_keys_;
  const std::int32_t* predicted_ids_ = nullptr;  // the token's, [L, n]
  std::vector<std::int32_t> predicted_keys_;     // the coming layer's
  std::vector<double> uploaded_ahead_;           // of cpu_ from its end: shares that were uploaded ahead
  std::vector<ExpertWeights> experts_;
  std::vector<float> weights_;
  Clock::time_point read_since_;
  std::vector<float> cold_sums_;  // [cold_.size(), H]
};

}  // namespace moebox
