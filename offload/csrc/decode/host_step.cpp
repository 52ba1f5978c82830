#include "decode/host_step.h"

#include <algorithm>
#include <cstring>
#include <ranges>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace moebox {
namespace {

using Seconds = std::chrono::duration<double>;

constexpr int kPausesPerClockRead = 32;
constexpr Seconds kPatience{50e-6};  // of spinning, until other threads get a chance
constexpr Seconds kErrorInterval{1e-3};

// A kernel that reads RAM over PCIe is that much slower than the copy engine.
constexpr double kPartRate = 0.9;
// Less than an eighth of an expert is not worth its launch, and a whole one had better stay in the cache.
constexpr std::size_t kSmallestPart = 8;
// A whole upload is an admission, too: dividing must save more than that.
constexpr double kWorthDividing = 0.95;
constexpr std::size_t kPartWords = 4;

std::int32_t load(std::int32_t* flag) { return std::atomic_ref(*flag).load(std::memory_order_acquire); }
void raise(std::int32_t* flag) { std::atomic_ref(*flag).store(1, std::memory_order_release); }

void write_list(const auto& picks, std::int32_t* list, float* weights) {
  list[0] = static_cast<std::int32_t>(picks.size());
  for (std::size_t i = 0; i < picks.size(); ++i) {
    list[1 + i] = picks[i].slot;
    weights[i] = picks[i].weight;
  }
}

// The expert at an address: gate, up, down, each packed values and then scales; without the first inner rows.
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

void LiveRate::set(double gbps) {
  constexpr double kTrust = 0.02;  // seconds
  seconds_ = kTrust;
  bytes_ = gbps * 1e9 * kTrust;
}

void LiveRate::add(double bytes, double seconds) {
  constexpr double kKeep = 0.98, kOutlier = 4;
  if (!(seconds > 0)) return;
  const double expected = bytes * seconds_ / bytes_;
  bytes_ = bytes_ * kKeep + bytes;
  seconds_ = seconds_ * kKeep + std::clamp(seconds, expected / kOutlier, expected * kOutlier);
}

double Misses::left(std::size_t uploads) const {
  double left = static_cast<double>(uploads);
  for (std::size_t i = 0; i < std::min(uploads, early.size()); ++i) left -= early[i];
  return left;
}

std::size_t split(const Misses& misses, double pcie_gbps, double cpu_gbps) {
  const auto longer = [&](std::size_t q) {
    return std::max(misses.left(q) / pcie_gbps, (misses.n - q) / cpu_gbps);
  };
  std::size_t best = 0;
  for (std::size_t q = 1; q <= std::min(misses.n, misses.most); ++q)
    if (longer(q) < longer(best)) best = q;
  return best;
}

Share divide(const Misses& misses, std::size_t inner, double pcie_gbps, double cpu_gbps) {
  const auto seconds = [&](std::size_t uploads, double part) {
    return std::max((misses.left(uploads) + part / kPartRate) / pcie_gbps,
                    (misses.n - uploads - part) / cpu_gbps);
  };
  Share best{split(misses, pcie_gbps, cpu_gbps), 0};
  double shortest = seconds(best.uploads, 0) * kWorthDividing;
  for (std::size_t q = 0; q <= misses.most && q < misses.n; ++q) {
    // where both roads would take as long
    const double even =
        ((misses.n - q) * pcie_gbps - misses.left(q) * cpu_gbps) / (cpu_gbps / kPartRate + pcie_gbps);
    if (even <= 0) break;
    const auto rows = static_cast<std::size_t>(even * static_cast<double>(inner) / kGroup + 0.5) * kGroup;
    if (rows < std::max(inner / kSmallestPart, kGroup) || rows + inner / kSmallestPart > inner ||
        rows >= inner)
      continue;
    const double length = seconds(q, static_cast<double>(rows) / static_cast<double>(inner));
    if (length >= shortest) continue;
    shortest = length;
    best = {q, rows};
  }
  return best;
}

DecodeRoads::DecodeRoads(ThreadPool& pool, Residency& residency, Copier& copier, const RoadShape& shape,
                         const Mailbox& mailbox, const Stores& stores, bool exclusive, ColdTier* cold,
                         const ExpertKernels& kernels, const Guesses& guesses)
    : pool_(pool),
      residency_(residency),
      copier_(copier),
      shape_(shape),
      box_(mailbox),
      guesses_(guesses),
      stores_(stores),
      kernels_(kernels),
      cold_tier_(cold),
      turnover_(residency, copier, stores, exclusive, cold),
      ahead_(residency, copier, stores),
      stats_(shape.layers) {
  if (!cold_tier_) return;
  if (!exclusive) throw std::invalid_argument("cold: only where experts are in RAM or on the GPU, not both");
  cold_tier_->attach(stores);
  cold_sums_.resize(shape.top_k * shape.hidden);
}

void DecodeRoads::clear() {
  copier_.attach();
  for (std::int32_t* flags : {box_.routed, box_.listed, box_.summed})
    std::memset(flags, 0, shape_.layers * kFlagWords * sizeof(std::int32_t));
  if (guesses_.flags) std::memset(guesses_.flags, 0, shape_.layers * kFlagWords * sizeof(std::int32_t));
  for (std::size_t layer = 0; layer < shape_.layers; ++layer) box_.part[layer * kPartWords] = -1;
  copier_.clear(box_.uploaded, shape_.layers * box_.uploaded_stride);
}

void DecodeRoads::run_token(const std::int32_t* trace, const std::int32_t* guesses, double timeout_s) {
  Hands hands(pool_);
  std::size_t layer = 0;
  abort_ = false;
  guessed_ids_ = guesses ? guesses : guesses_.ids;
  try {
    copier_.attach();
    learn_upload_times();
    residency_.set_tick(residency_.tick() + 1);
    if (cold_tier_) cold_tier_->set_tick(residency_.tick());
    turnover_.begin_token();
    for (; layer < shape_.layers; ++layer)
      run_layer(hands, layer, (trace ? trace : box_.ids) + layer * shape_.top_k, timeout_s);
    if (const auto error = copier_.error()) throw DeviceFailure(*error);
  } catch (...) {
    end_early(layer);
    recover();
    throw;
  }
}

void DecodeRoads::run_layer(Hands& hands, std::size_t layer, const std::int32_t* ids, double timeout_s) {
  LayerStats& stats = stats_[layer];
  stats = {};
  const auto start = Clock::now();
  wait_routed(layer, timeout_s);
  const auto seen = Clock::now();
  turnover_.begin_step();
  look_up(layer, ids);
  turnover_.make_room(hit_keys_);
  decide();
  publish_lists(layer);
  stats.listed_s = Seconds(Clock::now() - seen).count();
  read_cold(layer);
  compute(hands.lease, layer, seen);
  compute_cold(hands, layer);
  raise(box_.summed + layer * kFlagWords);
  stats.layer_s = Seconds(Clock::now() - seen).count();
  stats.wait_s = Seconds(seen - start).count();
  upload_ahead(layer + 1);
  residency_.foresee(keys_);
  if (cold_tier_) cold_tier_->foresee(keys_);
  learn_upload_times();
}

void DecodeRoads::wait_routed(std::size_t layer, double timeout_s) {
  std::int32_t* flag = box_.routed + layer * kFlagWords;
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
    if (now - start > kPatience) std::this_thread::yield();
    if (now - checked > kErrorInterval) {
      if (const auto error = copier_.error()) throw DeviceFailure(*error);
      checked = now;
    }
    if (now - start > Seconds(timeout_s))
      throw DeviceFailure("the GPU did not route MoE layer " + std::to_string(layer) + " within " +
                          std::to_string(timeout_s) + " s");
  }
}

// While the host has nothing else to do. The GPU guesses a layer behind what it read over PCIe for the one
// before, whose uploads come first anyway.
void DecodeRoads::upload_ahead(std::size_t layer) {
  if (layer >= shape_.layers || !guesses_.flags) return;
  if (!ahead_.guessed() && load(guesses_.flags + layer * kFlagWords)) {
    guessed_.clear();
    for (const std::int32_t id : std::span(guessed_ids_ + layer * guesses_.n, guesses_.n))
      if (id >= 0 && static_cast<std::size_t>(id) < shape_.n_experts)
        guessed_.push_back(static_cast<std::int32_t>(layer * shape_.n_experts + id));
    ahead_.guess(guessed_);
  }
  ahead_.feed();
}

// Sorts the layer's experts into hits, cold ones and, for the time being in cpu_, other misses.
void DecodeRoads::look_up(std::size_t layer, const std::int32_t* ids) {
  const float* weights = box_.weights + layer * shape_.top_k;
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
    if (cold && !cold_tier_)
      throw std::logic_error("expert " + std::to_string(id) + " of MoE layer " + std::to_string(layer) +
                             " is neither in RAM nor on the GPU");
    if (cold_tier_) cold_tier_->use(key);
    if (cold_tier_ && slot < 0 && !cold) cold_tier_->keep(key);
  }
  ahead_.compare(keys_);
}

// The misses used most go to the GPU, which keeps them, but before these those whose upload has begun.
// Without any slots the CPU has all of them.
void DecodeRoads::decide() {
  const auto weaker = [this](const Pick& a, const Pick& b) { return residency_.weaker(a.key, b.key); };
  early_.clear();
  if (ahead_.begun()) {
    std::ranges::sort(cpu_, weaker);
    std::ranges::stable_sort(cpu_, {}, [this](const Pick& pick) { return ahead_.bytes(pick.key); });
    for (const Pick& pick : cpu_ | std::views::reverse)
      early_.push_back(static_cast<double>(ahead_.bytes(pick.key)) /
                       static_cast<double>(stores_.expert_bytes));
  }
  const auto [n, part_rows] = share();
  part_rows_ = part_rows;
  if (n == 0) return;
  if (!ahead_.begun()) std::ranges::sort(cpu_, weaker);
  for (std::size_t i = 0; i < n; ++i) {
    Pick& pick = uploads_.emplace_back(cpu_.back());
    cpu_.pop_back();
    pick.slot = ahead_.slot(pick.key);
    if (pick.slot >= 0) {
      residency_.place(pick.key, pick.slot);
      ahead_.take(pick.key);
    } else {
      pick.slot = residency_.place(pick.key);
    }
    turnover_.arrives(pick.key);
  }
  // As if nothing had been early: sums hang on the order.
  std::ranges::sort(uploads_, [&](const Pick& a, const Pick& b) { return weaker(b, a); });
}

Share DecodeRoads::share() const {
  const Misses misses{cpu_.size(), residency_.n_free(), early_};
  if (residency_.n_slots() > 0 && takes_split_experts(kernels_))
    return divide(misses, shape_.inner, pcie.gbps(), cpu.gbps());
  return {split(misses, pcie.gbps(), cpu.gbps()), 0};
}

void DecodeRoads::publish_lists(std::size_t layer) {
  const std::size_t k = shape_.top_k;
  write_list(hits_, box_.hits + layer * (1 + k), box_.hit_weights + layer * k);
  write_list(uploads_, box_.uploads + layer * (1 + k), box_.upload_weights + layer * k);
  std::int32_t* part = box_.part + layer * kPartWords;
  part[0] = part_rows_ ? stores_.rows[cpu_.back().key] : -1;
  part[1] = static_cast<std::int32_t>(part_rows_);
  box_.part_weight[layer] = part_rows_ ? cpu_.back().weight : 0;
  raise(box_.listed + layer * kFlagWords);
}

void DecodeRoads::queue_uploads(std::size_t layer) {
  if (!uploads_.empty()) {
    const auto expert_bytes = static_cast<double>(stores_.expert_bytes);
    const Copier::Mark begin = copier_.mark(Copier::Way::up);
    double left = 0;
    for (const Pick& pick : uploads_) {
      const std::size_t early = ahead_.bytes(pick.key);
      left += static_cast<double>(stores_.expert_bytes - early);
      if (early < stores_.expert_bytes)
        copier_.upload(stores_.slot(pick.slot) + early, stores_.row(stores_.rows[pick.key]) + early,
                       stores_.expert_bytes - early);
    }
    stats_[layer].early = static_cast<double>(uploads_.size()) - left / expert_bytes;
    // The GPU reads its part over the same wires meanwhile.
    timings_.push_back(
        {layer, left > 0 ? left + part() * expert_bytes : 0, begin, copier_.mark(Copier::Way::up)});
    stats_[layer].upload_s = std::numeric_limits<double>::quiet_NaN();
  }
  stats_[layer].wasted = static_cast<double>(ahead_.forget()) / static_cast<double>(stores_.expert_bytes);
  copier_.signal(box_.uploaded + layer * box_.uploaded_stride, box_.one);
  turnover_.begin_downloads();
}

void DecodeRoads::compute(ThreadPool::Lease& lease, std::size_t layer, Clock::time_point seen) {
  LayerStats& stats = stats_[layer];
  stats.hits = static_cast<double>(hits_.size());
  stats.uploads = static_cast<double>(uploads_.size());
  stats.part = part();
  stats.cpu = static_cast<double>(cpu_.size()) - part();
  const auto start = Clock::now();
  sum_on_cpu(lease, layer, [&] {
    queue_uploads(layer);
    stats.schedule_s = Seconds(Clock::now() - seen).count();
  });
  if (cpu_.empty()) return;
  stats.cpu_s = Seconds(Clock::now() - start).count();
  cpu.add(stats.cpu * static_cast<double>(stores_.expert_bytes), stats.cpu_s);
}

void DecodeRoads::sum_on_cpu(ThreadPool::Lease& lease, std::size_t layer,
                             const std::function<void()>& first) {
  float* sum = box_.sums + layer * shape_.hidden;
  if (cpu_.empty()) {
    first();
    std::memset(sum, 0, shape_.hidden * sizeof(float));
    return;
  }
  experts_.clear(), weights_.clear();
  for (const Pick& pick : cpu_) {
    const std::size_t without = &pick == &cpu_.back() ? part_rows_ : 0;
    experts_.push_back(expert_at(stores_.row(stores_.rows[pick.key]), shape_.hidden, shape_.inner, without));
    weights_.push_back(pick.weight);
  }
  const std::uint16_t* hidden = box_.hidden + layer * shape_.hidden;
  experts_one(lease, {experts_.data(), experts_.size(), weights_.data(), hidden, sum}, kernels_, first);
}

void DecodeRoads::read_cold(std::size_t layer) {
  if (cold_.empty()) return;
  stats_[layer].cold = static_cast<double>(cold_.size());
  read_since_ = Clock::now();
  for (const Pick& pick : cold_) cold_tier_->read(pick.key);
}

// One after the other as they come; added up in the order of the picks, so that the sum hangs on no race.
void DecodeRoads::compute_cold(Hands& hands, std::size_t layer) {
  if (cold_.empty()) return;
  hands.hot.reset();  // reads take long, and their threads need cores
  const std::uint16_t* hidden = box_.hidden + layer * shape_.hidden;
  while (cold_tier_->reading()) {
    const std::int32_t key = cold_tier_->arrival();
    stats_[layer].read_s = Seconds(Clock::now() - read_since_).count();
    const auto pick = std::ranges::find(cold_, key, &Pick::key);
    const auto expert = expert_at(stores_.row(stores_.rows[key]), shape_.hidden, shape_.inner, 0);
    float* sum = cold_sums_.data() + (pick - cold_.begin()) * shape_.hidden;
    experts_one(hands.lease, {&expert, 1, &pick->weight, hidden, sum}, kernels_);
  }
  hands.hot.emplace(hands.lease);
  float* sum = box_.sums + layer * shape_.hidden;
  for (std::size_t i = 0; i < cold_.size(); ++i)
    for (std::size_t h = 0; h < shape_.hidden; ++h) sum[h] += cold_sums_[i * shape_.hidden + h];
}

void DecodeRoads::learn_upload_times() {
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

void DecodeRoads::settle() {
  copier_.attach();
  copier_.synchronize();
  learn_upload_times();
  turnover_.settle();
}

// Lets the GPU's program run to its end with whatever is there.
void DecodeRoads::end_early(std::size_t from) {
  for (std::size_t layer = from; layer < shape_.layers; ++layer) {
    std::int32_t* listed = box_.listed + layer * kFlagWords;
    if (!load(listed)) {
      box_.hits[layer * (1 + shape_.top_k)] = 0;
      box_.uploads[layer * (1 + shape_.top_k)] = 0;
      box_.part[layer * kPartWords] = -1;
      raise(listed);
    }
    std::memset(box_.sums + layer * shape_.hidden, 0, shape_.hidden * sizeof(float));
    raise(box_.summed + layer * kFlagWords);
    try {
      copier_.signal(box_.uploaded + layer * box_.uploaded_stride, box_.one);
    } catch (const DeviceFailure&) {
      // a device that takes no copies runs no program either
    }
  }
}

void DecodeRoads::recover() {
  try {
    copier_.synchronize();
  } catch (const DeviceFailure&) {
    // reported already
  }
  for (const Timing& timing : timings_) {
    copier_.drop(timing.begin);
    copier_.drop(timing.end);
  }
  timings_.clear();
  ahead_.recover();
  if (cold_tier_) cold_tier_->cancel();
  turnover_.undo();
}

}  // namespace moebox
