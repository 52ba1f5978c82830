#include "decode/host_step.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <ranges>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace moebox {
namespace {

using Seconds = std::chrono::duration<double>;

constexpr int kPausesPerClockRead = 32;
constexpr Seconds kSpin{50e-6};  // then other threads that wait for this CPU get it now and then
constexpr Seconds kErrorInterval{1e-3};

std::int32_t load(std::int32_t* flag) { return std::atomic_ref(*flag).load(std::memory_order_acquire); }
void raise(std::int32_t* flag) { std::atomic_ref(*flag).store(1, std::memory_order_release); }

void write_list(const auto& picks, std::int32_t* list, float* weights) {
  list[0] = static_cast<std::int32_t>(picks.size());
  for (std::size_t i = 0; i < picks.size(); ++i) {
    list[1 + i] = picks[i].slot;
    weights[i] = picks[i].weight;
  }
}

// The expert at an address (gate, up, down; of each the packed values, then the scales), without the first
// `without` inner rows: rows of gate and up, columns of down.
ExpertWeights expert_at(std::uintptr_t address, std::size_t hidden, std::size_t inner, std::size_t without) {
  const auto take = [&address](std::size_t rows, std::size_t columns) {
    const std::uintptr_t packed = address, scale = packed + rows * columns / 2;
    address = scale + rows * (columns / kGroup) * sizeof(std::uint16_t);
    return Matrix{reinterpret_cast<const std::uint8_t*>(packed),
                  reinterpret_cast<const std::uint16_t*>(scale), rows, columns / kGroup};
  };
  ExpertWeights expert{take(inner, hidden), take(inner, hidden), take(hidden, inner)};
  for (Matrix* rows : {&expert.gate, &expert.up}) {
    rows->packed += without * rows->stride * kGroupBytes;
    rows->scale += without * rows->stride;
    rows->rows -= without;
  }
  const std::size_t groups = without / kGroup;
  expert.down.packed += groups * kGroupBytes;
  expert.down.scale += groups;
  expert.down.groups -= groups;
  return expert;
}

}  // namespace

HostStep::HostStep(ThreadPool& pool, Residency& residency, Copier& copier, const ModelShape& shape,
                   const Mailbox& mailbox, const Stores& stores, RamRows* rows, ColdReader* cold,
                   const ExpertKernels& kernels)
    : pool_(pool),
      residency_(residency),
      copier_(copier),
      shape_(shape),
      box_(mailbox),
      stores_(stores),
      kernels_(kernels),
      cold_reader_(cold),
      eviction_(residency, copier, stores, rows),
      ahead_(residency, copier, stores),
      stats_(shape.layers) {
  if (!cold_reader_) return;
  if (rows != &cold->rows())
    throw std::invalid_argument("cold: only where experts are in RAM or on the GPU, not both");
  cold_reader_->attach(stores);
  cold_sums_.resize(shape.top_k * shape.hidden);
}

void HostStep::clear_flags() {
  copier_.attach();
  for (const auto& flags : {box_.routed, box_.listed, box_.summed, box_.predicted})
    std::memset(flags[0], 0, shape_.layers * flags.width * sizeof(std::int32_t));
  for (std::size_t layer = 0; layer < shape_.layers; ++layer) box_.split_expert[layer][0] = -1;
  copier_.clear(box_.uploaded.address(0), shape_.layers * box_.uploaded.width * sizeof(std::int32_t));
}

void HostStep::serve_token(const std::int32_t* ids, const std::int32_t* predicted_ids, double timeout_s) {
  Workers workers(pool_);
  std::size_t layer = 0;
  abort_ = false;
  predicted_ids_ = predicted_ids ? predicted_ids : box_.predicted_ids[0];
  try {
    copier_.attach();
    learn_upload_times();
    residency_.set_tick(residency_.tick() + 1);
    if (cold_reader_) cold_reader_->rows().residency().set_tick(residency_.tick());
    eviction_.begin_token();
    for (; layer < shape_.layers; ++layer)
      serve_layer(workers, layer, ids ? ids + layer * shape_.top_k : box_.ids[layer], timeout_s);
    if (const auto error = copier_.error()) throw DeviceFailure(*error);
  } catch (...) {
    let_program_end(layer);
    recover();
    throw;
  }
}

void HostStep::serve_layer(Workers& workers, std::size_t layer, const std::int32_t* ids, double timeout_s) {
  LayerStats& stats = stats_[layer];
  stats = {};
  const auto start = Clock::now();
  wait_until_routed(layer, timeout_s);
  const auto seen = Clock::now();
  eviction_.begin_step();
  look_up(layer, ids);
  eviction_.make_room(hit_keys_);
  split();
  publish_slots(layer);
  stats.listed_s = Seconds(Clock::now() - seen).count();
  read_cold(layer);
  compute(workers.lease, layer, seen);
  compute_cold(workers, layer);
  raise(box_.summed[layer]);
  stats.layer_s = Seconds(Clock::now() - seen).count();
  stats.wait_s = Seconds(seen - start).count();
  // From here on the GPU is busy with the next layer's attention.
  upload_ahead(layer + 1);
  residency_.update_values(keys_);
  if (cold_reader_) cold_reader_->rows().residency().update_values(keys_);
  learn_upload_times();
}

void HostStep::wait_until_routed(std::size_t layer, double timeout_s) {
  std::int32_t* flag = box_.routed[layer];
  const auto start = Clock::now();
  auto checked = start;
  for (;;) {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (load(flag)) return;
      pause_cpu();
    }
    upload_ahead(layer);
    if (abort_) throw std::runtime_error("the token was aborted at layer " + std::to_string(layer));
    const auto now = Clock::now();
    if (now - start > kSpin) std::this_thread::yield();
    if (now - checked > kErrorInterval) {
      if (const auto error = copier_.error()) throw DeviceFailure(*error);
      checked = now;
    }
    if (now - start > Seconds(timeout_s))
      throw DeviceFailure("the GPU did not route MoE layer " + std::to_string(layer) + " within " +
                          std::to_string(timeout_s) + " s");
  }
}

// Called while the host has nothing else to do. The GPU predicts a layer's experts after all of its own PCIe
// reads for the layer before, and the uploads of that layer are queued by then. So uploads ahead delay
// neither those reads nor those uploads.
void HostStep::upload_ahead(std::size_t layer) {
  if (layer >= shape_.layers) return;
  if (!ahead_.has_predictions() && load(box_.predicted[layer])) {
    predicted_keys_.clear();
    for (const std::int32_t id : std::span(predicted_ids_ + layer * n_predicted(), n_predicted()))
      if (id >= 0 && static_cast<std::size_t>(id) < shape_.n_experts)
        predicted_keys_.push_back(static_cast<std::int32_t>(layer * shape_.n_experts + id));
    ahead_.predict(predicted_keys_);
  }
  ahead_.queue_pieces();
}

// Sorts the layer's picks into hits (on the GPU), cold ones (on disk only) and misses in RAM, which all go to
// cpu_ at first.
void HostStep::look_up(std::size_t layer, const std::int32_t* ids) {
  const float* weights = box_.weights[layer];
  hits_.clear(), uploads_.clear(), cpu_.clear(), cold_.clear(), hit_keys_.clear(), keys_.clear();
  for (std::size_t i = 0; i < shape_.top_k; ++i) {
    const std::int32_t id = ids[i];
    if (id < 0 || static_cast<std::size_t>(id) >= shape_.n_experts || std::find(ids, ids + i, id) != ids + i)
      throw std::runtime_error("MoE layer " + std::to_string(layer) + ": expert " + std::to_string(id) +
                               " is out of range or chosen twice");
    const auto key = static_cast<std::int32_t>(layer * shape_.n_experts + id);
    const std::int32_t slot = residency_.slot(key);
    residency_.use(key, 1);
    keys_.push_back(key);
    const bool cold = slot < 0 && stores_.rows[key] < 0;
    (slot >= 0 ? hits_ : cold ? cold_ : cpu_).push_back({key, slot, weights[i]});
    if (slot >= 0) hit_keys_.push_back(key);
    if (cold && !cold_reader_)
      throw std::logic_error("expert " + std::to_string(id) + " of MoE layer " + std::to_string(layer) +
                             " is neither in RAM nor on the GPU");
    if (cold_reader_) cold_reader_->rows().residency().use(key, 1);
    if (cold_reader_ && slot < 0 && !cold) cold_reader_->rows().keep(key);
  }
  ahead_.count_found(keys_);
}

// Moves the misses that are uploaded from cpu_ to uploads_, and chooses the expert that is split. The most
// valuable misses are uploaded, since they stay on the GPU, but those whose upload has begun come first.
void HostStep::split() {
  uploaded_ahead_.clear();
  if (ahead_.any_begun()) order_misses();
  const auto [n, split_rows] = road_split();
  split_rows_ = split_rows;
  if (n == 0) return;
  if (!ahead_.any_begun()) order_misses();
  for (std::size_t i = 0; i < n; ++i) {
    place_upload(uploads_.emplace_back(cpu_.back()));
    cpu_.pop_back();
  }
  // The GPU adds up in the order of the list: it must not depend on what was uploaded ahead.
  std::ranges::sort(uploads_,
                    [this](const Pick& a, const Pick& b) { return residency_.weaker(b.key, a.key); });
}

// The last ones of cpu_ are uploaded first.
void HostStep::order_misses() {
  std::ranges::sort(cpu_, [this](const Pick& a, const Pick& b) { return residency_.weaker(a.key, b.key); });
  if (!ahead_.any_begun()) return;
  std::ranges::stable_sort(cpu_, {}, [this](const Pick& pick) { return ahead_.queued_bytes(pick.key); });
  for (const Pick& pick : cpu_ | std::views::reverse)
    uploaded_ahead_.push_back(static_cast<double>(ahead_.queued_bytes(pick.key)) /
                              static_cast<double>(stores_.expert_bytes));
}

// Without slots the CPU computes all misses.
RoadSplit HostStep::road_split() const {
  const Misses misses{cpu_.size(), residency_.n_free(), uploaded_ahead_};
  const RoadRates rates{pcie.gbps(), cpu.gbps()};
  if (residency_.n_slots() > 0 && takes_split_experts(kernels_))
    return split_misses(misses, shape_.inner, rates);
  return {split_whole_experts(misses, rates), 0};
}

void HostStep::place_upload(Pick& pick) {
  pick.slot = ahead_.slot(pick.key);
  if (pick.slot >= 0) {
    residency_.place(pick.key, pick.slot);
    ahead_.take(pick.key);
  } else {
    pick.slot = residency_.place(pick.key);
  }
  eviction_.arrives(pick.key);
}

void HostStep::publish_slots(std::size_t layer) {
  write_list(hits_, box_.resident_slots[layer], box_.resident_weights[layer]);
  write_list(uploads_, box_.upload_slots[layer], box_.upload_weights[layer]);
  std::int32_t* split = box_.split_expert[layer];
  split[0] = split_rows_ ? stores_.rows[cpu_.back().key] : -1;
  split[1] = static_cast<std::int32_t>(split_rows_);
  box_.split_weight[layer][0] = split_rows_ ? cpu_.back().weight : 0;
  raise(box_.listed[layer]);
}

void HostStep::queue_copies(std::size_t layer) {
  if (!uploads_.empty()) queue_uploads(layer);
  stats_[layer].wasted = static_cast<double>(ahead_.give_up()) / static_cast<double>(stores_.expert_bytes);
  copier_.signal(box_.uploaded.address(layer), box_.one.address(0));
  eviction_.begin_downloads();
}

void HostStep::queue_uploads(std::size_t layer) {
  const auto expert_bytes = static_cast<double>(stores_.expert_bytes);
  const Copier::Mark begin = copier_.mark(Copier::Way::up);
  double bytes = 0;
  for (const Pick& pick : uploads_) {
    const std::size_t queued = ahead_.queued_bytes(pick.key), rest = stores_.expert_bytes - queued;
    bytes += static_cast<double>(rest);
    if (rest > 0)
      copier_.upload(stores_.slot(pick.slot) + queued, stores_.row(stores_.rows[pick.key]) + queued, rest);
  }
  stats_[layer].early = static_cast<double>(uploads_.size()) - bytes / expert_bytes;
  // Meanwhile the GPU reads its share of the split expert over PCIe, too.
  const double all_bytes = bytes > 0 ? bytes + split_share() * expert_bytes : 0;
  timings_.push_back({layer, all_bytes, begin, copier_.mark(Copier::Way::up)});
  stats_[layer].upload_s = std::numeric_limits<double>::quiet_NaN();
}

void HostStep::compute(ThreadPool::Lease& lease, std::size_t layer, Clock::time_point seen) {
  LayerStats& stats = stats_[layer];
  stats.hits = static_cast<double>(hits_.size());
  stats.uploads = static_cast<double>(uploads_.size());
  stats.part = split_share();
  stats.cpu = static_cast<double>(cpu_.size()) - split_share();
  const auto start = Clock::now();
  sum_on_cpu(lease, layer, [&] {
    queue_copies(layer);
    stats.schedule_s = Seconds(Clock::now() - seen).count();
  });
  if (cpu_.empty()) return;
  stats.cpu_s = Seconds(Clock::now() - start).count();
  cpu.add(stats.cpu * static_cast<double>(stores_.expert_bytes), stats.cpu_s);
}

void HostStep::sum_on_cpu(ThreadPool::Lease& lease, std::size_t layer,
                          const std::function<void()>& on_start) {
  float* sum = box_.cpu_sums[layer];
  if (cpu_.empty()) {
    on_start();
    std::memset(sum, 0, shape_.hidden * sizeof(float));
    return;
  }
  experts_.clear(), weights_.clear();
  for (const Pick& pick : cpu_) {
    const std::size_t without = &pick == &cpu_.back() ? split_rows_ : 0;
    experts_.push_back(expert_at(stores_.row(stores_.rows[pick.key]), shape_.hidden, shape_.inner, without));
    weights_.push_back(pick.weight);
  }
  experts_one(lease, {experts_.data(), experts_.size(), weights_.data(), box_.hidden[layer], sum}, kernels_,
              on_start);
}

void HostStep::read_cold(std::size_t layer) {
  if (cold_.empty()) return;
  stats_[layer].cold = static_cast<double>(cold_.size());
  read_since_ = Clock::now();
  for (const Pick& pick : cold_) cold_reader_->read(pick.key);
}

// Computes each expert as its read ends, and adds them up in the order of the picks, whatever the order of
// reads.
void HostStep::compute_cold(Workers& workers, std::size_t layer) {
  if (cold_.empty()) return;
  workers.awake.reset();  // reads take long, and their threads need cores
  while (cold_reader_->reading()) {
    const std::int32_t key = cold_reader_->arrival();
    stats_[layer].read_s = Seconds(Clock::now() - read_since_).count();
    const auto pick = std::ranges::find(cold_, key, &Pick::key);
    const auto expert = expert_at(stores_.row(stores_.rows[key]), shape_.hidden, shape_.inner, 0);
    float* sum = cold_sums_.data() + (pick - cold_.begin()) * shape_.hidden;
    experts_one(workers.lease, {&expert, 1, &pick->weight, box_.hidden[layer], sum}, kernels_);
  }
  workers.awake.emplace(workers.lease);
  float* sum = box_.cpu_sums[layer];
  for (std::size_t i = 0; i < cold_.size(); ++i)
    for (std::size_t h = 0; h < shape_.hidden; ++h) sum[h] += cold_sums_[i * shape_.hidden + h];
}

void HostStep::learn_upload_times() {
  while (!timings_.empty() && copier_.reached(timings_.front().end)) {
    const Timing& timing = timings_.front();
    const double seconds = copier_.seconds(timing.begin, timing.end);
    stats_[timing.layer].upload_s = seconds;
    if (timing.bytes > 0) pcie.add(timing.bytes, seconds);
    copier_.drop(timing.begin);
    copier_.drop(timing.end);
    timings_.pop_front();
  }
}

void HostStep::wait_for_copies() {
  copier_.attach();
  copier_.synchronize();
  learn_upload_times();
  eviction_.finish();
}

// Raises the flags of all layers from `from` on, so that the GPU's program ends; its result is worthless.
void HostStep::let_program_end(std::size_t from) {
  for (std::size_t layer = from; layer < shape_.layers; ++layer) {
    if (!load(box_.listed[layer])) {
      box_.resident_slots[layer][0] = 0;
      box_.upload_slots[layer][0] = 0;
      box_.split_expert[layer][0] = -1;
      raise(box_.listed[layer]);
    }
    std::memset(box_.cpu_sums[layer], 0, shape_.hidden * sizeof(float));
    raise(box_.summed[layer]);
    try {
      copier_.signal(box_.uploaded.address(layer), box_.one.address(0));
    } catch (const DeviceFailure&) {
      // a device that takes no copies runs no program either
    }
  }
}

void HostStep::recover() {
  try {
    copier_.synchronize();
  } catch (const DeviceFailure&) {
    // serve_token() reports the first failure
  }
  for (const Timing& timing : timings_) {
    copier_.drop(timing.begin);
    copier_.drop(timing.end);
  }
  timings_.clear();
  ahead_.reset();
  if (cold_reader_) cold_reader_->cancel();
  eviction_.undo();
}

}  // namespace moebox
