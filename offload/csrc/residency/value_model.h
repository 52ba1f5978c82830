// Guesses from a layer's picks which of its experts the next tokens will pick.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace moebox {

// An expert's worth is its expected use at the tokens to come, each counting kDiscount of the one before it.
// The guess is linear: part of the expert's recent use, and for each pick nearby a weight that is learned
// from how the last guess turned out (temporal differences; Sutton 1988). Nearby are the layer's own picks at
// this token and the one before, and the previous layer's at this token.
class Foresight {
 public:
  Foresight(std::size_t layers, std::size_t n_experts);

  // picks: the layer's experts at the token of this tick. recent: [n_experts], an expert's share of the last
  // tokens. Returns each expert's worth [n_experts], valid until the layer's next step.
  std::span<const float> step(std::size_t layer, std::int64_t tick, std::span<const std::int32_t> picks,
                              std::span<const float> recent);

 private:
  enum Source { same_token, token_before, layer_before, kSources };
  struct Layer {
    std::int64_t tick = -2;
    std::vector<std::int32_t> picks;
    std::vector<float*> rows;  // whose weights made the guess
    std::vector<float> worth;
  };

  void add_rows(Source source, std::size_t layer, std::span<const std::int32_t> picks);
  void learn(const Layer& layer, std::span<const std::int32_t> picks);

  const std::size_t n_experts_;
  std::vector<Layer> layers_;
  std::array<std::vector<float>, kSources> weights_;  // [layers, picked expert, guessed expert]
  std::vector<float*> rows_;
  std::vector<float> worth_, error_;
};

}  // namespace moebox
