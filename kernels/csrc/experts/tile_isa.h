// The engine for many tokens with AMX. Weights are the A operand (16 rows of 32 bf16), 16 tokens the B
// operand.
#pragma once

#include "amx_isa.h"
#include "experts/bf16_isa.h"

#if MOEBOX_ISA_AMX

namespace moebox::MOEBOX_ISA {
namespace {

struct Tiles {
  static constexpr std::size_t kEdge = 16;              // rows and tokens of a tile of sums
  static constexpr std::size_t kTile = kEdge * kGroup;  // bf16 in an A or B tile
  static constexpr std::size_t kSums = kEdge * kEdge;   // fp32 in a C tile
  static constexpr std::size_t kPanelGroups = 16;       // 2 x 16 A tiles are 32 KiB
  static constexpr std::size_t kMaxBundles = 8;         // of 16 tokens, in one multiply()

  // Operand of 16 tokens: [group][pair of elements][token][2].
  static std::size_t operand_bytes(std::size_t groups) { return groups * kTile * 2; }
  static std::size_t scratch_bytes(std::size_t) {
    return 2 * kPanelGroups * kTile * 2 + kMaxBundles * 2 * kSums * sizeof(float);
  }

  static void prepare(const Rows& rows, std::size_t groups, std::byte* operand) {
    if (rows.n < kEdge) std::memset(operand, 0, operand_bytes(groups));
    for (std::size_t t = 0; t < rows.n; ++t) {
      for (std::size_t g = 0; g < groups; ++g) {
        std::byte* column = operand + g * kTile * 2 + t * 4;
        _mm512_i32scatter_epi32(column, every_sixteenth(), Bf16::regrouped(rows.row[t], g, rows.bf16), 4);
      }
    }
  }

  static __m512i every_sixteenth() {
    return _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  }

  // The panel is [half of the rows][group][16][32]. Prefetches the next panel's groups.
  static void dequantize(const Matrix& m, std::size_t row, std::size_t group, std::size_t n,
                         std::uint16_t* panel) {
    const bool last = group + n == m.groups;
    for (std::size_t r = 0; r < kRowBlock; ++r) {
      const std::size_t at = (row + r) * m.stride + group;
      std::uint16_t* out = panel + r / kEdge * kPanelGroups * kTile + r % kEdge * kGroup;
      alignas(64) float scale[kPanelGroups];
      prefetch_groups(m, last ? row + r + kRowBlock : row + r, last ? 0 : group + n, kPanelGroups);
      load_scales(m.scale + at, n, scale);
      for (std::size_t g = 0; g < n; ++g)
        Bf16::dequantize(m.packed + (at + g) * kGroupBytes, scale[g], out + g * kTile);
    }
  }

  // 32 rows times 32 tokens (kTwo bundles) or 16; sums are [half of the rows][16][16] per bundle.
  template <bool kTwo>
  static void block(const std::uint16_t* panel, const std::uint16_t* x, std::size_t x_bundle,
                    std::size_t groups, float* sums, bool add) {
    if (add) {
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + kSums, 64);
      if constexpr (kTwo) _tile_loadd(2, sums + 2 * kSums, 64);
      if constexpr (kTwo) _tile_loadd(3, sums + 3 * kSums, 64);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (std::size_t g = 0; g < groups; ++g) {
      _tile_loadd(4, panel + g * kTile, 64);
      _tile_loadd(6, x + g * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, panel + (kPanelGroups + g) * kTile, 64);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (kTwo) {
        _tile_loadd(7, x + x_bundle + g * kTile, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kSums, 64);
    if constexpr (kTwo) _tile_stored(2, sums + 2 * kSums, 64);
    if constexpr (kTwo) _tile_stored(3, sums + 3 * kSums, 64);
  }

  // Copies sums [bundle][half][row][token] to c[t][r].
  static void store(const float* sums, std::size_t n, float* c, std::size_t ldc) {
    for (std::size_t t = 0; t < n; ++t) {
      const float* from = sums + t / kEdge * 2 * kSums + t % kEdge;
      _mm512_storeu_ps(c + t * ldc, _mm512_i32gather_ps(every_sixteenth(), from, 4));
      _mm512_storeu_ps(c + t * ldc + kEdge, _mm512_i32gather_ps(every_sixteenth(), from + kSums, 4));
    }
  }

  static void multiply(const Matrix& m, std::size_t first, std::size_t n_rows, const std::byte* operands,
                       std::size_t n, float* c, std::size_t ldc, std::byte* scratch) {
    const auto* x = reinterpret_cast<const std::uint16_t*>(operands);
    auto* panel = reinterpret_cast<std::uint16_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(scratch + 2 * kPanelGroups * kTile * 2);
    const std::size_t bundles = (n + kEdge - 1) / kEdge, x_bundle = m.groups * kTile;
    configure_tiles();
    for (std::size_t r = 0; r < n_rows; r += kRowBlock) {
      for (std::size_t group = 0; group < m.groups; group += kPanelGroups) {
        const std::size_t width = m.groups - group < kPanelGroups ? m.groups - group : kPanelGroups;
        dequantize(m, first + r, group, width, panel);
        tile_memory_fence();
        for (std::size_t b = 0; b < bundles; b += 2) {
          const std::uint16_t* bundle = x + b * x_bundle + group * kTile;
          if (b + 1 < bundles)
            block<true>(panel, bundle, x_bundle, width, sums + b * 2 * kSums, group > 0);
          else
            block<false>(panel, bundle, x_bundle, width, sums + b * 2 * kSums, group > 0);
        }
      }
      tile_memory_fence();
      store(sums, n, c + r, ldc);
    }
    _tile_release();
  }

  static constexpr Engine engine() { return {kEdge, operand_bytes, scratch_bytes, prepare, multiply}; }
};

}  // namespace
}  // namespace moebox::MOEBOX_ISA

#endif
