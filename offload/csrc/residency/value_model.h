// Estimates from a layer's picks how much the next tokens will use each of its experts.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace moebox {

// The value of expert j is its discounted expected use at the tokens to come,
//   value[j] = (1 - d) * sum over i >= 1 of d^(i - 1) * P(token t + i picks j),   d = kDiscount.
// The estimate is linear in the recent use and in the picks around it,
//   value[j] = kRecent * recent[j] + sum over nearby picks p of weight[source of p][layer][p][j],
// where the sources are the layer's own picks at this token and at the token before, and the previous layer's
// picks at this token. One token later the weights that made an estimate are corrected by its error (temporal
// differences; Sutton 1988):
//   error[j] = (1 - d) * (1 if j was picked now, else 0) + d * value now[j] - value then[j].
class ValueModel {
 public:
  ValueModel(std::size_t layers, std::size_t n_experts);

  // picks: the layer's experts at the token of this tick. recent: [n_experts], the share of the last tokens
  // that picked each expert. Returns each expert's value [n_experts], valid until the layer's next step.
  std::span<const float> step(std::size_t layer, std::int64_t tick, std::span<const std::int32_t> picks,
                              std::span<const float> recent);

 private:
  enum Source { same_token, token_before, layer_before, kSources };
  struct Layer {
    std::int64_t tick = -2;
    std::vector<std::int32_t> picks;
    std::vector<float*> rows;   // of weights, that were added up to the last estimate
    std::vector<float> values;  // the last estimate
  };

  void add_rows(Source source, std::size_t layer, std::span<const std::int32_t> picks);
  void learn(const Layer& layer, std::span<const std::int32_t> picks);

  const std::size_t n_experts_;
  std::vector<Layer> layers_;
  std::array<std::vector<float>, kSources> weights_;  // [layers, picked expert, estimated expert]
  std::vector<float*> rows_;
  std::vector<float> values_, error_;
};

}  // namespace moebox
