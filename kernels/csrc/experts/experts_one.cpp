// One round of the pool for one token. Tasks wait for the tasks they need by counters, not for a whole round.
#include "experts/experts_one.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "sizes.h"

namespace moebox {
namespace {

constexpr std::size_t kPrepareGroups = 16;  // of a task
// Rows of a task. A task starts without prefetched weights, so more rows are better for it. With fewer rows
// the threads finish at more nearly the same time, which matters more where there are few experts.
constexpr std::size_t kGateRows = 32, kDownRows = 128;
constexpr std::size_t kFewExperts = 2, kGateRowsOfFew = 16, kDownRowsOfFew = 64;

// Counts finished tasks up from 0; other tasks wait until it is full.
class Counter {
 public:
  // Counts one task; returns whether it was the last.
  bool add(std::uint32_t full) { return count_.fetch_add(1, std::memory_order_acq_rel) + 1 == full; }
  void wait(std::uint32_t full) const {
    constexpr int kPatience = 2000;
    for (int i = 0; count_.load(std::memory_order_acquire) < full; ++i) {
      pause_cpu();
      if (i > kPatience) std::this_thread::yield();
    }
  }

 private:
  std::atomic<std::uint32_t> count_{0};
};

// The tasks, in the order in which threads take them: pieces of the hidden state's operand; gate and up of
// all experts; down of all experts. A task waits for the tasks that it needs, all of which were taken before
// it.
class OneToken {
 public:
  OneToken(ThreadPool::Lease& pool, const OneTokenCall& call, const Engine& engine,
           const ExpertKernels& kernels)
      : call_(call), engine_(engine), silu_mul_(kernels.silu_mul) {
    hidden_groups_ = call.experts[0].gate.groups;
    gate_rows_ = call.n <= kFewExperts ? kGateRowsOfFew : kGateRows;
    down_rows_ = call.n <= kFewExperts ? kDownRowsOfFew : kDownRows;
    prepare_tasks_ = ceil_div(hidden_groups_, kPrepareGroups);
    for (std::size_t e = 0; e < call.n; ++e) {
      inner_groups_ = std::max(inner_groups_, inner_groups(e));
      gate_tasks_ += inner(e) / gate_rows_;
    }
    down_tasks_ = ceil_div(hidden(), down_rows_);
    place(pool);
  }

  std::size_t tasks() const { return prepare_tasks_ + gate_tasks_ + call_.n * down_tasks_; }
  // Packed bytes that the call reads.
  std::size_t bytes() const { return gate_tasks_ * gate_rows_ * 3 * hidden() / 2; }

  void run(std::size_t task) {
    if (task < prepare_tasks_) return prepare(task);
    task -= prepare_tasks_;
    if (task < gate_tasks_) return gate_up(task * gate_rows_);
    task -= gate_tasks_;
    down(task / down_tasks_, task % down_tasks_);
  }

 private:
  std::size_t hidden() const { return hidden_groups_ * kGroup; }
  // Experts may differ in their inner rows: a split expert has fewer.
  std::size_t inner_groups(std::size_t expert) const { return call_.experts[expert].down.groups; }
  std::size_t inner(std::size_t expert) const { return inner_groups(expert) * kGroup; }
  float* h(std::size_t expert) const { return h_ + expert * inner_groups_ * kGroup; }
  std::byte* h_operand(std::size_t expert) const { return h_operand_ + expert * h_operand_bytes_; }
  float* output(std::size_t expert) const { return outputs_ + expert * hidden(); }

  // Shares the scratch memory out.
  void place(ThreadPool::Lease& pool) {
    std::size_t end = 0;
    const auto take = [&end](std::size_t bytes) {
      return std::exchange(end, end + round_up(bytes, kCacheLine));
    };
    h_operand_bytes_ = round_up(engine_.operand_bytes(inner_groups_), kCacheLine);
    const std::size_t operands_bytes = round_up(engine_.operand_bytes(hidden_groups_), kCacheLine);
    const std::size_t x = take(operands_bytes + call_.n * h_operand_bytes_);
    const std::size_t h = take(call_.n * inner_groups_ * kGroup * sizeof(float));
    const std::size_t outputs = take(call_.n * hidden() * sizeof(float));
    const std::size_t n_counters = 1 + call_.n * (1 + inner_groups_) + down_tasks_;
    const std::size_t counters = take(n_counters * sizeof(Counter));
    std::byte* memory = pool.scratch(end);
    x_operand_ = memory + x;
    h_operand_ = x_operand_ + operands_bytes;
    std::memset(x_operand_, 0, operands_bytes + call_.n * h_operand_bytes_);
    h_ = reinterpret_cast<float*>(memory + h);
    outputs_ = reinterpret_cast<float*>(memory + outputs);
    prepared_ = reinterpret_cast<Counter*>(memory + counters);
    std::uninitialized_default_construct_n(prepared_, n_counters);
    inner_ready_ = prepared_ + 1;
    group_ready_ = inner_ready_ + call_.n;
    columns_ready_ = group_ready_ + call_.n * inner_groups_;
  }

  void prepare(std::size_t task) {
    const std::size_t first = task * kPrepareGroups;
    const std::size_t n = std::min(kPrepareGroups, hidden_groups_ - first);
    engine_.prepare_groups(call_.hidden, true, first, n, hidden_groups_, x_operand_);
    prepared_->add(prepare_tasks_);
  }

  // `first` counts the inner rows of all experts, one expert after another.
  void gate_up(std::size_t first) {
    std::size_t expert = 0;
    for (; first >= inner(expert); ++expert) first -= inner(expert);
    float gate[kGateRows], up[kGateRows];
    const ExpertWeights& weights = call_.experts[expert];
    prepared_->wait(prepare_tasks_);
    engine_.multiply(weights.gate, first, gate_rows_, x_operand_, 1, gate, gate_rows_, nullptr);
    engine_.multiply(weights.up, first, gate_rows_, x_operand_, 1, up, gate_rows_, nullptr);
    silu_mul_(gate, up, h(expert) + first, gate_rows_);
    const std::size_t group = first / kGroup, tasks_per_group = kGroup / gate_rows_;
    if (!group_ready_[expert * inner_groups_ + group].add(tasks_per_group)) return;
    engine_.prepare_groups(h(expert), false, group, 1, inner_groups(expert), h_operand(expert));
    inner_ready_[expert].add(inner_groups(expert));
  }

  void down(std::size_t expert, std::size_t block) {
    const std::size_t first = block * down_rows_, rows = std::min(down_rows_, hidden() - first);
    inner_ready_[expert].wait(inner_groups(expert));
    engine_.multiply(call_.experts[expert].down, first, rows, h_operand(expert), 1, output(expert) + first,
                     rows, nullptr);
    if (columns_ready_[block].add(call_.n)) add_up(first, rows);
  }

  // Adds in the order of the experts, whichever of them was last to be ready: the same bits each time.
  void add_up(std::size_t first, std::size_t rows) {
    float sum[kDownRows] = {};
    for (std::size_t e = 0; e < call_.n; ++e)
      for (std::size_t r = 0; r < rows; ++r) sum[r] += call_.weights[e] * output(e)[first + r];
    std::memcpy(call_.out + first, sum, rows * sizeof(float));
  }

  const OneTokenCall& call_;
  const Engine& engine_;
  void (*const silu_mul_)(const float* gate, const float* up, float* h, std::size_t n);
  std::size_t hidden_groups_, gate_rows_, down_rows_, prepare_tasks_, down_tasks_;
  std::size_t inner_groups_ = 0;  // of the widest expert
  std::size_t gate_tasks_ = 0;    // of all experts
  std::size_t h_operand_bytes_;
  std::byte *x_operand_, *h_operand_;
  float *h_, *outputs_;
  Counter *prepared_, *inner_ready_, *group_ready_, *columns_ready_;
};

// For an instruction set whose engines cannot prepare() one group at a time.
void as_many(ThreadPool::Lease& pool, const OneTokenCall& call, const ExpertKernels& kernels,
             const std::function<void()>& on_start) {
  std::vector<const ExpertWeights*> experts;
  std::vector<std::int32_t> offsets{0}, tokens(call.n, 0);
  for (std::size_t e = 0; e < call.n; ++e) {
    experts.push_back(&call.experts[e]);
    offsets.push_back(static_cast<std::int32_t>(e + 1));
  }
  std::fill_n(call.out, call.experts[0].down.rows, 0.0f);
  const ExpertsCall many{experts.data(), call.n,      offsets.data(), tokens.data(),
                         call.weights,   call.hidden, true,           call.out};
  experts_forward(pool, many, kernels, on_start);
}

}  // namespace

void experts_one(ThreadPool::Lease& pool, const OneTokenCall& call, const ExpertKernels& kernels,
                 const std::function<void()>& on_start) {
  if (!kernels.few.prepare_groups) return as_many(pool, call, kernels, on_start);
  OneToken token(pool, call, kernels.few, kernels);
  auto run = [&token](std::size_t task, int) { token.run(task); };
  if (token.bytes() >= kShareFromBytes) return pool.run(token.tasks(), run, on_start);
  if (on_start) on_start();
  for (std::size_t task = 0; task < token.tasks(); ++task) run(task, 0);
}

}  // namespace moebox
