// Divides the work of one layer's experts among the pool's threads. A batch takes four rounds: hidden states
// become operands; gate, up and silu; their products become operands; down, added to the output.
#include "experts/experts.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "pool.h"
#include "sizes.h"

namespace moebox {
namespace {

// Bounds a worker's sums, and keeps one item's operands near the second-level cache.
constexpr std::size_t kMaxItemPairs = 128;
constexpr std::size_t kMaxTaskRows = 128;
// Enough tasks that the threads finish at about the same time.
constexpr std::size_t kTasksPerWorker = 8;
// The same for down() with many pairs an item, where each task reads the operands of all items again.
constexpr std::size_t kTasksPerWorkerOfMany = 4, kManyPairs = 16;

// Some pairs of one expert, which one engine multiplies.
struct Item {
  const ExpertWeights* expert;
  const Engine* engine;
  std::size_t first_pair, n;
  std::size_t bundles() const { return ceil_div(n, engine->bundle); }
  // Offsets into the batch's scratch memory.
  std::size_t x_operand = 0, h = 0, h_operand = 0;
};

class Batch {
 public:
  Batch(ThreadPool::Lease& pool, const ExpertsCall& call, const ExpertKernels& kernels,
        std::vector<Item> items, std::function<void()> on_start)
      : pool_(pool),
        call_(call),
        kernels_(kernels),
        items_(std::move(items)),
        on_start_(std::move(on_start)) {
    place();
  }

  void run() {
    prepare(
        hidden_groups(), &Item::x_operand,
        [this](const Item& item, std::size_t i) { return hidden_row(call_.tokens[item.first_pair + i]); },
        call_.hidden_bf16);
    gate_up();
    prepare(
        inner_groups(), &Item::h_operand,
        [this](const Item& item, std::size_t i) -> const void* { return h(item) + i * inner(); }, false);
    down();
  }

 private:
  std::size_t hidden_groups() const { return items_.front().expert->gate.groups; }
  std::size_t inner_groups() const { return items_.front().expert->down.groups; }
  std::size_t hidden() const { return hidden_groups() * kGroup; }
  std::size_t inner() const { return inner_groups() * kGroup; }

  const void* hidden_row(std::size_t token) const {
    return static_cast<const std::byte*>(call_.hidden) + token * hidden() * (call_.hidden_bf16 ? 2 : 4);
  }
  float* h(const Item& item) const { return reinterpret_cast<float*>(memory_ + item.h); }
  std::byte* worker_scratch(int worker) const { return memory_ + workers_at_ + worker * worker_bytes_; }
  // A worker's scratch: two blocks of sums, [kMaxItemPairs, kMaxTaskRows] each, then the engine's scratch.
  float* sums(int worker, int which) const {
    return reinterpret_cast<float*>(worker_scratch(worker)) + which * kMaxItemPairs * kMaxTaskRows;
  }
  std::byte* engine_scratch(int worker) const {
    return worker_scratch(worker) + 2 * kMaxItemPairs * kMaxTaskRows * sizeof(float);
  }

  // Shares the scratch memory out.
  void place() {
    std::size_t end = 0, engine_bytes = 0;
    const auto take = [&end](std::size_t bytes) {
      return std::exchange(end, end + round_up(bytes, kCacheLine));
    };
    for (Item& item : items_) {
      const Engine& engine = *item.engine;
      item.x_operand = take(item.bundles() * engine.operand_bytes(hidden_groups()));
      item.h = take(item.n * inner() * sizeof(float));
      item.h_operand = take(item.bundles() * engine.operand_bytes(inner_groups()));
      engine_bytes = std::max(
          {engine_bytes, engine.scratch_bytes(hidden_groups()), engine.scratch_bytes(inner_groups())});
    }
    for (const Item& item : items_) pairs_ += item.n;
    alone_ = pairs_ * 3 * hidden() * inner() / 2 < kShareFromBytes;
    workers_at_ = end;
    worker_bytes_ = 2 * kMaxItemPairs * kMaxTaskRows * sizeof(float) + round_up(engine_bytes, kCacheLine);
    memory_ = pool_.scratch(end + worker_bytes_ * pool_.size());
  }

  // Rows of a task. A task starts without prefetched weights, so it has many rows; but there are enough tasks
  // that the threads finish at about the same time.
  std::size_t task_rows(std::size_t rows, std::size_t sharers, std::size_t tasks_per_worker) const {
    const std::size_t even = rows * sharers / (tasks_per_worker * pool_.size());
    return std::clamp(even / kRowBlock * kRowBlock, kRowBlock, kMaxTaskRows);
  }

  template <class Task>
  void run_tasks(std::size_t tasks, Task&& task) {
    const auto on_start = std::exchange(on_start_, {});
    if (!alone_) return pool_.run(tasks, task, on_start);
    if (on_start) on_start();
    for (std::size_t i = 0; i < tasks; ++i) task(i, 0);
  }

  template <class Row>
  void prepare(std::size_t groups, std::size_t Item::* operand, Row row, bool bf16) {
    std::vector<std::pair<const Item*, std::size_t>> bundles;
    for (const Item& item : items_)
      for (std::size_t b = 0; b < item.bundles(); ++b) bundles.emplace_back(&item, b);
    run_tasks(bundles.size(), [&](std::size_t task, int) {
      const auto [item, b] = bundles[task];
      const Engine& engine = *item->engine;
      const void* rows[16];
      std::size_t n = 0;
      for (std::size_t i = b * engine.bundle; n < engine.bundle && i < item->n; ++i)
        rows[n++] = row(*item, i);
      engine.prepare({rows, n, bf16}, groups, memory_ + item->*operand + b * engine.operand_bytes(groups));
    });
  }

  void gate_up() {
    const std::size_t rows = task_rows(inner(), items_.size(), kTasksPerWorker);
    const std::size_t blocks = ceil_div(inner(), rows);
    run_tasks(items_.size() * blocks, [&](std::size_t task, int worker) {
      const Item& item = items_[task / blocks];
      const std::size_t first = task % blocks * rows;
      gate_up_block(item, first, std::min(rows, inner() - first), worker);
    });
  }

  void gate_up_block(const Item& item, std::size_t first, std::size_t rows, int worker) {
    const std::byte* x = memory_ + item.x_operand;
    float *gate = sums(worker, 0), *up = sums(worker, 1);
    item.engine->multiply(item.expert->gate, first, rows, x, item.n, gate, rows, engine_scratch(worker));
    item.engine->multiply(item.expert->up, first, rows, x, item.n, up, rows, engine_scratch(worker));
    for (std::size_t t = 0; t < item.n; ++t)
      kernels_.silu_mul(gate + t * rows, up + t * rows, h(item) + t * inner() + first, rows);
  }

  // A task has some columns of the output, for all experts: no two workers add to one element.
  void down() {
    const bool many = pairs_ > kManyPairs * items_.size();
    const std::size_t rows = task_rows(hidden(), 1, many ? kTasksPerWorkerOfMany : kTasksPerWorker);
    run_tasks(ceil_div(hidden(), rows), [&](std::size_t task, int worker) {
      const std::size_t first = task * rows;
      for (const Item& item : items_) down_block(item, first, std::min(rows, hidden() - first), worker);
    });
  }

  void down_block(const Item& item, std::size_t first, std::size_t rows, int worker) {
    float* sum = sums(worker, 0);
    item.engine->multiply(item.expert->down, first, rows, memory_ + item.h_operand, item.n, sum, rows,
                          engine_scratch(worker));
    for (std::size_t t = 0; t < item.n; ++t) {
      const std::size_t pair = item.first_pair + t;
      float* out = call_.out + call_.tokens[pair] * hidden() + first;
      for (std::size_t r = 0; r < rows; ++r) out[r] += call_.weights[pair] * sum[t * rows + r];
    }
  }

  ThreadPool::Lease& pool_;
  const ExpertsCall& call_;
  const ExpertKernels& kernels_;
  std::vector<Item> items_;
  std::function<void()> on_start_;  // moves to the first round
  std::size_t pairs_ = 0;
  bool alone_ = false;  // too little work to wake the workers
  std::byte* memory_ = nullptr;
  std::size_t workers_at_ = 0, worker_bytes_ = 0;
};

const Engine& choose_engine(const ExpertKernels& kernels, bool bf16, std::size_t n) {
  if (!bf16) return kernels.exact;
  return n <= kernels.few_tokens ? kernels.few : kernels.many;
}

std::vector<Item> make_items(const ExpertsCall& call, const ExpertKernels& kernels) {
  std::vector<Item> items;
  for (std::size_t e = 0; e < call.n_experts; ++e) {
    const std::size_t end = call.offsets[e + 1];
    const Engine& engine = choose_engine(kernels, call.hidden_bf16, end - call.offsets[e]);
    for (std::size_t pair = call.offsets[e]; pair < end; pair += kMaxItemPairs)
      items.push_back({call.experts[e], &engine, pair, std::min(kMaxItemPairs, end - pair)});
  }
  return items;
}

}  // namespace

void experts_forward(ThreadPool::Lease& lease, const ExpertsCall& call, const ExpertKernels& kernels,
                     std::function<void()> on_start) {
  std::vector<Item> batch;
  std::size_t pairs = 0;
  const auto run_batch = [&] {
    Batch(lease, call, kernels, std::exchange(batch, {}), std::exchange(on_start, {})).run();
    pairs = 0;
  };
  for (const Item& item : make_items(call, kernels)) {
    if (pairs + item.n > kBatchPairs) run_batch();
    batch.push_back(item);
    pairs += item.n;
  }
  if (!batch.empty()) run_batch();
  if (on_start) on_start();
}

}  // namespace moebox
