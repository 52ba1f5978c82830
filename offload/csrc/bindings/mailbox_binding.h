// Tensors that Python hands over as a mailbox.
#pragma once

#include <nanobind/nanobind.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "decode/mailbox.h"

namespace moebox {

// Values of the symbols of MOEBOX_MAILBOX's shapes.
using MailboxSizes = std::map<std::string, std::optional<std::size_t>>;

// L, n: nullopt where the tensors decide.
MailboxSizes mailbox_sizes(std::optional<std::size_t> layers, std::size_t top_k, std::size_t hidden,
                           std::optional<std::size_t> predictions);

// A checked mailbox, and the arrays that keep its memory alive.
struct BoundMailbox {
  // Tensors by name: all of MOEBOX_MAILBOX and no other. Sets the sizes that have no value. Throws TypeError
  // (dtype, device, no array) or ValueError (shape, strides, read-only, a missing or an unknown name).
  BoundMailbox(const nanobind::dict& tensors, MailboxSizes& sizes);

  std::vector<OutArray> arrays;  // in the table's order
  Mailbox box;
};

}  // namespace moebox
