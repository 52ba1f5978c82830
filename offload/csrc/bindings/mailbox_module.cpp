// The mailbox's table for Python, and the check of the tensors that come back.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <sstream>
#include <type_traits>

#include "mailbox_binding.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

struct Field {
  const char* name;
  Type type;
  std::vector<std::string> shape;  // symbols
  const char *writer, *memory, *meaning;

  bool on_device() const { return std::strcmp(memory, "device") == 0; }
};

template <class Element>
constexpr Type type_of() {
  if constexpr (std::is_same_v<Element, float>) return Type::float32;
  if constexpr (std::is_same_v<Element, std::uint16_t>) return Type::bf16;
  static_assert(std::is_same_v<Element, float> || std::is_same_v<Element, std::uint16_t> ||
                std::is_same_v<Element, std::int32_t>);
  return Type::int32;
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

const std::vector<Field>& fields() {
#define MOEBOX_ENTRY(name, element, shape, writer, memory, meaning) \
  {#name, type_of<element>(), words(shape), #writer, #memory, meaning},
  static const std::vector<Field> table = {MOEBOX_MAILBOX(MOEBOX_ENTRY)};
#undef MOEBOX_ENTRY
  return table;
}

// Each tensor's shape in numbers, by name.
nb::dict shapes(std::size_t layers, std::size_t top_k, std::size_t hidden_size, std::size_t predictions) {
  const MailboxSizes sizes = mailbox_sizes(layers, top_k, hidden_size, predictions);
  nb::dict shapes;
  for (const Field& field : fields()) {
    nb::list shape;
    for (const std::string& symbol : field.shape) shape.append(*sizes.at(symbol));
    shapes[field.name] = nb::tuple(shape);
  }
  return shapes;
}

// Plain Python data: instances of a bound class that modules hold would count as leaks when Python ends.
nb::list table() {
  nb::list table;
  for (const Field& field : fields())
    table.append(nb::make_tuple(field.name, type_name(field.type), nb::tuple(nb::cast(field.shape)),
                                field.writer, field.memory, field.meaning));
  return table;
}

std::vector<Dim> dims(const Field& field, MailboxSizes& sizes) {
  std::vector<Dim> shape;
  for (const std::string& symbol : field.shape) shape.push_back({symbol.c_str(), sizes.at(symbol)});
  return shape;
}

OutArray checked(const Field& field, nb::handle tensor, MailboxSizes& sizes) {
  OutArray array = writable(tensor, field.name);
  check(Array(array), field.name, field.type, dims(field, sizes));
  if (!field.on_device()) check_memory(Array(array), field.name);
  return array;
}

template <class Element>
LayerRows<Element> rows(const OutArray& array) {
  std::size_t width = array.ndim() > 1 ? 1 : array.size();
  for (std::size_t i = 1; i < array.ndim(); ++i) width *= array.shape(i);
  return {elements<Element>(array), width};
}

void refuse_unknown_names(const nb::dict& tensors) {
  for (const auto& [key, tensor] : tensors) {
    const auto given = nb::cast<std::string>(key);
    if (std::ranges::none_of(fields(), [&](const Field& field) { return given == field.name; }))
      value_error(given + ": given, but the mailbox has no tensor of this name");
  }
}

}  // namespace

MailboxSizes mailbox_sizes(std::optional<std::size_t> layers, std::size_t top_k, std::size_t hidden,
                           std::optional<std::size_t> predictions) {
  return {{"L", layers},      {"k", top_k},      {"1+k", 1 + top_k}, {"H", hidden},
          {"n", predictions}, {"F", kFlagWords}, {"S", kSplitWords}, {"1", 1}};
}

BoundMailbox::BoundMailbox(const nb::dict& tensors, MailboxSizes& sizes) {
  refuse_unknown_names(tensors);
  for (const Field& field : fields()) {
    if (!tensors.contains(field.name)) value_error(std::string(field.name) + ": missing from the mailbox");
    arrays.push_back(checked(field, tensors[field.name], sizes));
  }
  std::size_t i = 0;
#define MOEBOX_BIND(name, element, ...) box.name = rows<element>(arrays[i++]);
  MOEBOX_MAILBOX(MOEBOX_BIND)
#undef MOEBOX_BIND
}

void register_mailbox(nb::module_& m) {
  m.attr("MAILBOX_FIELDS") = table();
  m.def("mailbox_shapes", shapes, "layers"_a, "top_k"_a, "hidden_size"_a, "predictions"_a);
  m.attr("FLAG_WORDS") = kFlagWords;
  m.attr("SPLIT_WORDS") = kSplitWords;
}

}  // namespace moebox
