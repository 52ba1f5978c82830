// The mailbox: tensors through which the GPU's decode program and its host side exchange one token's data.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moebox {

constexpr std::size_t kFlagWords = 16;  // int32 words of a cache line: each flag has a line of its own
constexpr std::size_t kSplitWords = 4;

// The only list of the mailbox's tensors. Python allocates them from it, and the binding checks them against
// it: to add a tensor, add a line here and use it.
//
// FIELD(name, element, shape, writer, memory, meaning). A bfloat16 element is a std::uint16_t that holds its
// bits. Shape symbols: L MoE layers, k experts chosen per token, 1+k the same behind a count, H hidden_size,
// n predicted experts, F kFlagWords, S kSplitWords. The writer is the GPU's program, the host or the copy
// stream; of a flag, element 0 of its row is raised (set to 1), behind everything that the flag announces.
// The host takes all flags down between two tokens. Each row belongs to one layer, so no element is written
// twice in a token.
//
// Decoding several sequences in one step adds a symbol B behind L, to every tensor but the flags and `one`:
// LayerRows::width then counts the elements of all sequences.
// clang-format off
#define MOEBOX_MAILBOX(FIELD)                                                                                \
  FIELD(routed, std::int32_t, "L F", gpu, pinned, "flag: ids, weights and hidden are there")                 \
  FIELD(ids, std::int32_t, "L k", gpu, pinned, "the experts that the router chose")                          \
  FIELD(weights, float, "L k", gpu, pinned, "their weights")                                                 \
  FIELD(hidden, std::uint16_t, "L H", gpu, pinned, "the experts' input")                                     \
  FIELD(listed, std::int32_t, "L F", host, pinned, "flag: the slots and the split expert are there")         \
  FIELD(resident_slots, std::int32_t, "L 1+k", host, pinned, "a count, and slots of resident experts")       \
  FIELD(resident_weights, float, "L k", host, pinned, "weights of these experts")                            \
  FIELD(upload_slots, std::int32_t, "L 1+k", host, pinned, "a count, and slots of uploaded experts")         \
  FIELD(upload_weights, float, "L k", host, pinned, "weights of these experts")                              \
  FIELD(split_expert, std::int32_t, "L S", host, pinned,                                                     \
        "the expert that GPU and CPU both compute: its row of RAM or -1, and the GPU's inner rows of it")    \
  FIELD(split_weight, float, "L 1", host, pinned, "its weight")                                              \
  FIELD(uploaded, std::int32_t, "L F", copies, device, "flag: the uploads are complete")                     \
  FIELD(summed, std::int32_t, "L F", host, pinned, "flag: cpu_sums is there")                                \
  FIELD(cpu_sums, float, "L H", host, pinned, "weighted sum of the experts that the CPU computes")           \
  FIELD(predicted, std::int32_t, "L F", gpu, pinned, "flag: predicted_ids is there")                         \
  FIELD(predicted_ids, std::int32_t, "L n", gpu, pinned,                                                     \
        "experts that the layer will probably choose, the likeliest first; nothing of layer 0")              \
  FIELD(one, std::int32_t, "F", host, pinned, "1 in element 0, which the copy stream copies to `uploaded`")
// clang-format on

// A tensor of the mailbox: for each layer a row of `width` elements.
template <class Element>
struct LayerRows {
  Element* data = nullptr;
  std::size_t width = 0;

  Element* operator[](std::size_t layer) const { return data + layer * width; }
  std::uintptr_t address(std::size_t layer) const {
    return reinterpret_cast<std::uintptr_t>(data) + layer * width * sizeof(Element);
  }
};

struct Mailbox {
#define MOEBOX_MEMBER(name, element, ...) LayerRows<element> name;
  MOEBOX_MAILBOX(MOEBOX_MEMBER)
#undef MOEBOX_MEMBER
};

}  // namespace moebox
