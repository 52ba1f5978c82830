// HostStep for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "decode/host_step.h"
#include "mailbox_binding.h"
#include "module.h"
#include "to_numpy.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;
using Pair = std::pair<std::size_t, std::size_t>;

void check_shape(const ModelShape& shape) {
  if (shape.hidden == 0 || shape.inner == 0 || shape.hidden % kGroup || shape.inner % kGroup)
    value_error("shape: (" + std::to_string(shape.hidden) + ", " + std::to_string(shape.inner) +
                ") given, multiples of 32 needed");
  if (shape.top_k == 0 || shape.top_k > shape.n_experts)
    value_error("top_k: " + std::to_string(shape.top_k) +
                " given, 1 to n_experts=" + std::to_string(shape.n_experts) + " needed");
}

void check_keys(const ModelShape& shape, const Residency& residency) {
  if (shape.layers * shape.n_experts != residency.n_keys())
    value_error("residency: n_keys " + std::to_string(residency.n_keys()) +
                " given, L=" + std::to_string(shape.layers) +
                " times n_experts=" + std::to_string(shape.n_experts) + " needed");
}

void check_rows(const std::int32_t* row_of, std::size_t n_keys, std::size_t n_rows) {
  for (std::size_t key = 0; key < n_keys; ++key)
    if (row_of[key] < -1 || row_of[key] >= static_cast<std::int64_t>(n_rows))
      value_error("ram_rows[" + std::to_string(key) + "]: " + std::to_string(row_of[key]) +
                  " given, -1 or a row of ram's " + std::to_string(n_rows) + " needed");
}

// Bytes of an INT4 expert: three matrices, each with a bf16 scale for kGroup weights.
std::size_t expert_bytes(const ModelShape& shape) {
  const std::size_t weights = 3 * shape.hidden * shape.inner;
  return weights / 2 + weights / kGroup * sizeof(std::uint16_t);
}

// slab: address and stride. Throws where an expert does not fit a stride, or a row is out of range.
Stores checked_stores(const OutArray& ram, const OutArray& ram_rows,
                      std::pair<std::uintptr_t, std::size_t> slab, const ModelShape& shape) {
  std::optional<std::size_t> rows, stride, n_keys = shape.layers * shape.n_experts;
  check(Array(ram), "ram", {Type::uint8}, {{"rows", rows}, {"stride", stride}});
  check(Array(ram_rows), "ram_rows", {Type::int32}, {{"n_keys", n_keys}});
  const std::size_t bytes = expert_bytes(shape);
  for (const std::size_t size : {*stride, slab.second})
    if (size < bytes)
      value_error("stride: " + std::to_string(size) + " bytes given, at least an expert's " +
                  std::to_string(bytes) + " needed");
  auto* row_of = elements<std::int32_t>(ram_rows);
  check_rows(row_of, *n_keys, *rows);
  return {
      reinterpret_cast<std::uintptr_t>(ram.data()), *stride, *rows, row_of, slab.first, slab.second, bytes};
}

void set_rate(LiveRate& rate, const char* name, double gbps) {
  if (!(gbps > 0 && std::isfinite(gbps)))
    value_error(std::string(name) + ": " + std::to_string(gbps) + " given, more than 0 needed");
  rate.set(gbps);
}

// A HostStep, and the arrays that keep its memory alive.
class BoundHostStep {
 public:
  BoundHostStep(ThreadPool& pool, Residency& residency, Copier& copier, Pair shape, Pair experts,
                const nb::dict& mailbox, nb::handle ram, nb::handle ram_rows,
                std::pair<std::uintptr_t, std::size_t> slab, RamRows* rows, ColdReader* cold,
                std::pair<double, double> gbps, const std::optional<std::string>& isa)
      : ram_(writable(ram, "ram")), ram_rows_(writable(ram_rows, "ram_rows")) {
    ModelShape model{0, experts.first, experts.second, shape.first, shape.second};
    check_shape(model);
    MailboxSizes sizes = mailbox_sizes({}, model.top_k, model.hidden, {});
    mailbox_.emplace(mailbox, sizes);
    model.layers = *sizes.at("L");
    check_keys(model, residency);
    step_.emplace(pool, residency, copier, model, mailbox_->box, checked_stores(ram_, ram_rows_, slab, model),
                  rows, cold, MOEBOX_TABLE(kExpertKernels, choose_isa(isa)));
    set_rate(step_->pcie, "pcie_gbps", gbps.first);
    set_rate(step_->cpu, "cpu_gbps", gbps.second);
  }

  HostStep& get() { return *step_; }

  void serve_token(const std::optional<Array>& ids, double timeout_s,
                   const std::optional<Array>& predicted_ids) {
    std::optional<std::size_t> L = step_->shape().layers, k = step_->shape().top_k, n = step_->n_predicted();
    if (ids) check(*ids, "ids", {Type::int32}, {{"L", L}, {"k", k}});
    if (predicted_ids) check(*predicted_ids, "predicted_ids", {Type::int32}, {{"L", L}, {"n", n}});
    if (!(timeout_s > 0))
      value_error("timeout_s: " + std::to_string(timeout_s) + " given, more than 0 needed");
    const nb::gil_scoped_release unlocked;
    step_->serve_token(ids ? elements<std::int32_t>(*ids) : nullptr,
                       predicted_ids ? elements<std::int32_t>(*predicted_ids) : nullptr, timeout_s);
  }

  nb::ndarray<nb::numpy, double> stats() const {
    const auto& stats = step_->stats();
    const auto* begin = reinterpret_cast<const double*>(stats.data());
    const std::size_t fields = LayerStats::kFields.size();
    return to_numpy(std::vector<double>(begin, begin + stats.size() * fields), stats.size(), fields);
  }

  nb::ndarray<nb::numpy, std::int64_t> ahead_counts() {
    const auto* begin = reinterpret_cast<const std::int64_t*>(&step_->ahead().counts());
    const std::size_t fields = UploadAhead::Counts::kFields.size();
    return to_numpy(std::vector<std::int64_t>(begin, begin + fields), fields);
  }

  void set_piece_bytes(std::size_t bytes) {
    if (bytes == 0) value_error("piece_bytes: 0 given, more than 0 needed");
    step_->ahead().piece_bytes = bytes;
  }

 private:
  const OutArray ram_, ram_rows_;
  std::optional<BoundMailbox> mailbox_;
  std::optional<HostStep> step_;
};

template <class Fields>
nb::object names(const Fields& fields) {
  return nb::cast(std::vector<std::string>(fields.begin(), fields.end()));
}

}  // namespace

void register_host_step(nb::module_& m) {
  m.attr("ROAD_FIELDS") = names(LayerStats::kFields);
  m.attr("AHEAD_FIELDS") = names(UploadAhead::Counts::kFields);
  using Bound = BoundHostStep;
  nb::class_<Bound>(m, "HostStep")
      .def(nb::init<ThreadPool&, Residency&, Copier&, Pair, Pair, const nb::dict&, nb::handle, nb::handle,
                    std::pair<std::uintptr_t, std::size_t>, RamRows*, ColdReader*, std::pair<double, double>,
                    const std::optional<std::string>&>(),
           "pool"_a, "residency"_a, "copier"_a, "shape"_a, "experts"_a, "mailbox"_a, "ram"_a, "ram_rows"_a,
           "slab"_a, "rows"_a.none(), "cold"_a.none(), "gbps"_a, "isa"_a.none(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 11>(), nb::keep_alive<1, 12>())
      .def("serve_token", &Bound::serve_token, "ids"_a.none(), "timeout_s"_a,
           "predicted_ids"_a.none() = nb::none())
      .def(
          "clear_flags", [](Bound& b) { b.get().clear_flags(); }, Unlocked())
      .def("abort", [](Bound& b) { b.get().abort(); })
      .def(
          "wait_for_copies", [](Bound& b) { b.get().wait_for_copies(); }, Unlocked())
      .def_prop_rw(
          "pcie_gbps", [](Bound& b) { return b.get().pcie.gbps(); },
          [](Bound& b, double gbps) { set_rate(b.get().pcie, "pcie_gbps", gbps); })
      .def_prop_rw(
          "cpu_gbps", [](Bound& b) { return b.get().cpu.gbps(); },
          [](Bound& b, double gbps) { set_rate(b.get().cpu, "cpu_gbps", gbps); })
      .def_prop_rw(
          "piece_bytes", [](Bound& b) { return b.get().ahead().piece_bytes; }, &Bound::set_piece_bytes)
      .def_prop_ro("ahead_counts", &Bound::ahead_counts, nb::rv_policy::move)
      .def_prop_ro("stats", &Bound::stats, nb::rv_policy::move);
}

}  // namespace moebox
