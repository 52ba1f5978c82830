#include "residency/value_model.h"

namespace moebox {
namespace {

constexpr float kDiscount = 0.7f;
// Weight of recent use in an estimate. Before anything is learned, an estimate is this alone.
constexpr float kRecent = 0.35f;
// The part of an error that one step corrects, in equal shares by all weights of the estimate.
constexpr float kRate = 0.1f;

}  // namespace

ValueModel::ValueModel(std::size_t layers, std::size_t n_experts)
    : n_experts_(n_experts), layers_(layers), values_(n_experts), error_(n_experts) {
  for (Layer& layer : layers_) layer.values.resize(n_experts);
  for (auto& weights : weights_) weights.resize(layers * n_experts * n_experts);
}

std::span<const float> ValueModel::step(std::size_t layer, std::int64_t tick,
                                        std::span<const std::int32_t> picks, std::span<const float> recent) {
  Layer& own = layers_[layer];
  const bool follows = own.tick + 1 == tick;
  rows_.clear();
  add_rows(same_token, layer, picks);
  if (follows) add_rows(token_before, layer, own.picks);
  if (layer > 0 && layers_[layer - 1].tick == tick) add_rows(layer_before, layer, layers_[layer - 1].picks);
  for (std::size_t j = 0; j < n_experts_; ++j) values_[j] = kRecent * recent[j];
  for (const float* row : rows_)
    for (std::size_t j = 0; j < n_experts_; ++j) values_[j] += row[j];
  if (follows) learn(own, picks);
  own.tick = tick;
  own.picks.assign(picks.begin(), picks.end());
  own.rows.swap(rows_);
  own.values.swap(values_);
  return own.values;
}

void ValueModel::add_rows(Source source, std::size_t layer, std::span<const std::int32_t> picks) {
  for (const std::int32_t pick : picks)
    rows_.push_back(weights_[source].data() + (layer * n_experts_ + pick) * n_experts_);
}

// values_: the estimate of this token; layer.values: that of the token before.
void ValueModel::learn(const Layer& layer, std::span<const std::int32_t> picks) {
  for (std::size_t j = 0; j < n_experts_; ++j) error_[j] = kDiscount * values_[j] - layer.values[j];
  for (const std::int32_t pick : picks) error_[pick] += 1 - kDiscount;
  const float rate = kRate / static_cast<float>(layer.rows.size());
  for (float* row : layer.rows)
    for (std::size_t j = 0; j < n_experts_; ++j) row[j] += rate * error_[j];
}

}  // namespace moebox
