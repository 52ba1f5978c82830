// Residency, the copiers and DecodeRoads for Python.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <random>

#include "arrays.h"
#include "decode/host_step.h"
#include "device/cuda_copier.h"
#include "device/host_copier.h"
#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moebox {
namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <class T, class... Sizes>
nb::ndarray<nb::numpy, T> to_numpy(std::vector<T> values, Sizes... sizes) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T>(kept->data(), {static_cast<std::size_t>(sizes)...}, owner);
}

[[noreturn]] void bad(const std::string& message) { throw nb::value_error(message.c_str()); }

std::int32_t checked(const Residency& residency, std::int64_t key) {
  if (key < 0 || static_cast<std::size_t>(key) >= residency.n_keys())
    bad("key: " + std::to_string(key) + " given, 0 to n_keys=" + std::to_string(residency.n_keys()) +
        " - 1 needed");
  return static_cast<std::int32_t>(key);
}

// Calls visit(key, value) for each of keys and values, all checked before.
template <class Visit>
void for_keys(const Residency& residency, const Array& keys, const std::optional<Array>& values,
              const char* name, Visit&& visit) {
  std::optional<std::size_t> n;
  check(keys, "keys", {Type::int32}, {{"n", n}});
  if (values) check(*values, name, {Type::float32}, {{"n", n}});
  const auto* key = static_cast<const std::int32_t*>(keys.data());
  const auto* value = values ? static_cast<const float*>(values->data()) : nullptr;
  for (std::size_t i = 0; i < *n; ++i) {
    checked(residency, key[i]);
    if (value && !(value[i] >= 0 && std::isfinite(value[i])))
      bad(std::string(name) + "[" + std::to_string(i) + "]: " + std::to_string(value[i]) +
          " given, a number of at least 0 needed");
  }
  for (std::size_t i = 0; i < *n; ++i) visit(key[i], value ? value[i] : 1.0f);
}

std::int32_t with_row(RamRows& rows, std::int64_t key) {
  if (rows.residency().slot(checked(rows.residency(), key)) < 0)
    bad("key: " + std::to_string(key) + " has no row");
  return static_cast<std::int32_t>(key);
}

void register_residency(nb::module_& m) {
  nb::class_<Residency>(m, "Residency")
      .def(nb::init<std::size_t, std::size_t, std::size_t, double, std::size_t>(), "n_keys"_a, "n_slots"_a,
           "reserve"_a, "half_life"_a = 16.0, "n_experts"_a = 0)
      .def_prop_rw("tick", &Residency::tick, &Residency::set_tick)
      .def_prop_ro("n_keys", &Residency::n_keys)
      .def_prop_ro("n_slots", &Residency::n_slots)
      .def_prop_ro("reserve", &Residency::reserve)
      .def_prop_ro("n_free", &Residency::n_free)
      .def_prop_ro("n_resident", &Residency::n_resident)
      .def("slots", [](const Residency& r) { return to_numpy(r.slots(), r.n_slots()); })
      .def("table", [](const Residency& r) { return to_numpy(r.table(), r.n_keys()); })
      .def(
          "slot", [](const Residency& r, std::int64_t key) { return r.slot(checked(r, key)); }, "key"_a)
      .def(
          "use",
          [](Residency& r, const Array& keys, const std::optional<Array>& counts) {
            for_keys(r, keys, counts, "counts", [&r](std::int32_t key, float n) { r.use(key, n); });
          },
          "keys"_a.noconvert(), "counts"_a.noconvert() = nb::none())
      .def(
          "foresee",
          [](Residency& r, const Array& keys) {
            std::vector<std::int32_t> picks;
            for_keys(r, keys, std::nullopt, "", [&picks](std::int32_t key, float) { picks.push_back(key); });
            for (const std::int32_t key : picks)
              if (key / r.n_experts() != picks[0] / r.n_experts())
                bad("keys: " + std::to_string(picks[0]) + " and " + std::to_string(key) +
                    " given, keys of one layer needed");
            r.foresee(picks);
          },
          "keys"_a.noconvert())
      .def(
          "score", [](const Residency& r, std::int64_t key) { return r.score(checked(r, key)); }, "key"_a)
      .def("scores",
           [](const Residency& r) {
             std::vector<float> scores(r.n_keys());
             for (std::size_t key = 0; key < scores.size(); ++key)
               scores[key] = static_cast<float>(r.score(static_cast<std::int32_t>(key)));
             return to_numpy(std::move(scores), r.n_keys());
           })
      .def(
          "seed",
          [](Residency& r, const Array& keys, const Array& scores) {
            for_keys(r, keys, scores, "scores", [&r](std::int32_t key, float score) { r.seed(key, score); });
          },
          "keys"_a.noconvert(), "scores"_a.noconvert())
      .def(
          "place",
          [](Residency& r, std::int64_t key) {
            if (r.slot(checked(r, key)) >= 0) bad("key: " + std::to_string(key) + " is resident already");
            return r.place(static_cast<std::int32_t>(key));
          },
          "key"_a)
      .def(
          "release",
          [](Residency& r, std::int64_t key) {
            if (r.slot(checked(r, key)) < 0) bad("key: " + std::to_string(key) + " is not resident");
            r.release(static_cast<std::int32_t>(key));
          },
          "key"_a)
      .def("weakest", &Residency::weakest, "n"_a)
      .def("trim", &Residency::trim);
}

void register_rows(nb::module_& m) {
  using Table = nb::ndarray<std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  nb::class_<RamRows>(m, "RamRows")
      .def(
          "__init__",
          [](RamRows* self, const Table& table, std::size_t n_rows, std::size_t reserve, double half_life,
             std::size_t n_experts) {
            new (self) RamRows({table.data(), table.size()}, n_rows, reserve, half_life, n_experts);
          },
          "table"_a.noconvert(), "n_rows"_a, "reserve"_a, "half_life"_a, "n_experts"_a,
          nb::keep_alive<1, 2>())
      .def_prop_ro("residency", &RamRows::residency, nb::rv_policy::reference_internal)
      .def("take_over", &RamRows::take_over)
      .def(
          "place",
          [](RamRows& rows, std::int64_t key) {
            if (rows.residency().slot(checked(rows.residency(), key)) >= 0)
              bad("key: " + std::to_string(key) + " has a row already");
            return rows.place(static_cast<std::int32_t>(key));
          },
          "key"_a)
      .def(
          "arrived", [](RamRows& rows, std::int64_t key) { rows.arrived(with_row(rows, key)); }, "key"_a)
      .def(
          "drop", [](RamRows& rows, std::int64_t key) { rows.drop(with_row(rows, key)); }, "key"_a)
      .def(
          "hand_over",
          [](RamRows& rows, std::int64_t from, std::int64_t to) {
            if (rows.residency().slot(checked(rows.residency(), to)) >= 0)
              bad("to_key: " + std::to_string(to) + " has a row already");
            rows.hand_over(with_row(rows, from), static_cast<std::int32_t>(to));
          },
          "from_key"_a, "to_key"_a)
      .def(
          "weakest",
          [](RamRows& rows, std::size_t n, const std::vector<std::int32_t>& busy) {
            for (const std::int32_t key : busy) checked(rows.residency(), key);
            return rows.weakest(n, busy);
          },
          "n"_a, "busy"_a = std::vector<std::int32_t>())
      .def(
          "make_room",
          [](RamRows& rows, std::size_t n_free, const std::vector<std::int32_t>& busy) {
            for (const std::int32_t key : busy) checked(rows.residency(), key);
            rows.make_room(n_free, busy);
          },
          "n_free"_a, "busy"_a = std::vector<std::int32_t>());
}

void register_copiers(nb::module_& m) {
  nb::exception<DeviceFailure>(m, "DeviceFailure", PyExc_RuntimeError);
  nb::class_<Copier>(m, "Copier")
      .def("attach", &Copier::attach)
      .def("upload", &Copier::upload, "destination"_a, "source"_a, "nbytes"_a, Unlocked())
      .def("download", &Copier::download, "destination"_a, "source"_a, "nbytes"_a, Unlocked())
      .def("signal", &Copier::signal, "flag"_a, "one"_a, Unlocked())
      .def("clear", &Copier::clear, "destination"_a, "nbytes"_a, Unlocked())
      .def("synchronize", &Copier::synchronize, Unlocked())
      .def("error", &Copier::error, Unlocked());
  nb::class_<HostCopier, Copier>(m, "HostCopier")
      .def(
          "__init__",
          [](HostCopier* self, std::optional<std::uint64_t> seed, double max_delay_us) {
            if (!(max_delay_us >= 0 && max_delay_us <= 1e6))
              bad("max_delay_us: " + std::to_string(max_delay_us) + " given, 0 to 1000000 needed");
            new (self) HostCopier(seed ? *seed : std::random_device{}(), max_delay_us);
          },
          "seed"_a = nb::none(), "max_delay_us"_a = 0.0)
      .def("fail_after", &HostCopier::fail_after, "copies"_a);
  nb::class_<CudaCopier, Copier>(m, "CudaCopier")
      .def(nb::init<std::uintptr_t, std::uintptr_t>(), "upload_stream"_a, "download_stream"_a);
}

template <class T>
T* data(const Array& array) {
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// DecodeRoads and what it points into.
class Roads {
 public:
  // ram, ram_rows, routed, listed, summed, ids, weights, hits, hit_weights, uploads, upload_weights, hidden,
  // sums, part, part_weight
  using Arrays = std::array<Array, 15>;

  Roads(ThreadPool& pool, Residency& residency, Copier& copier, std::pair<std::size_t, std::size_t> shape,
        Arrays arrays, std::pair<std::uintptr_t, std::size_t> slab,
        std::tuple<std::uintptr_t, std::size_t, std::uintptr_t> flags,
        std::pair<std::size_t, std::size_t> experts, RamRows* rows, std::pair<double, double> gbps,
        const std::optional<std::string>& isa, ColdReader* cold,
        std::optional<std::pair<Array, Array>> guesses)
      : arrays_(std::move(arrays)), guesses_(std::move(guesses)) {
    const RoadShape road = checked_shape(shape, experts, residency);
    const auto& [uploaded, uploaded_stride, one] = flags;
    if (uploaded_stride < sizeof(std::int32_t))
      bad("uploaded_stride_bytes: " + std::to_string(uploaded_stride) + " given, at least 4 needed");
    roads_.emplace(pool, residency, copier, road, mailbox(uploaded, uploaded_stride, one),
                   stores(road, slab, residency), rows, cold, MOEBOX_TABLE(kExpertKernels, choose_isa(isa)),
                   checked_guesses(road.layers));
    set(roads_->pcie, "pcie_gbps", gbps.first);
    set(roads_->cpu, "cpu_gbps", gbps.second);
  }

  DecodeRoads& get() { return *roads_; }

  void run_token(const std::optional<Array>& ids, double timeout_s, const std::optional<Array>& guesses) {
    std::optional<std::size_t> L = roads_->shape().layers, k = roads_->shape().top_k;
    std::optional<std::size_t> n = roads_->n_guesses();
    if (ids) check(*ids, "ids", {Type::int32}, {{"L", L}, {"k", k}});
    if (guesses) check(*guesses, "guesses", {Type::int32}, {{"L", L}, {"n", n}});
    if (!(timeout_s > 0)) bad("timeout_s: " + std::to_string(timeout_s) + " given, more than 0 needed");
    const nb::gil_scoped_release unlocked;
    roads_->run_token(ids ? data<const std::int32_t>(*ids) : nullptr,
                      guesses ? data<const std::int32_t>(*guesses) : nullptr, timeout_s);
  }

  static void set(LiveRate& rate, const char* name, double gbps) {
    if (!(gbps > 0 && std::isfinite(gbps)))
      bad(std::string(name) + ": " + std::to_string(gbps) + " given, more than 0 needed");
    rate.set(gbps);
  }

  nb::ndarray<nb::numpy, double> stats() const {
    const auto& stats = roads_->stats();
    const auto* begin = reinterpret_cast<const double*>(stats.data());
    const std::size_t fields = LayerStats::kFields.size();
    return to_numpy(std::vector<double>(begin, begin + stats.size() * fields), stats.size(), fields);
  }

  nb::ndarray<nb::numpy, std::int64_t> ahead() {
    const auto* begin = reinterpret_cast<const std::int64_t*>(&roads_->ahead().counts());
    const std::size_t fields = AheadUploads::Counts::kFields.size();
    return to_numpy(std::vector<std::int64_t>(begin, begin + fields), fields);
  }

 private:
  Guesses checked_guesses(std::size_t layers) const {
    if (!guesses_) return {};
    std::optional<std::size_t> L = layers, n, words = kFlagWords;
    check(guesses_->first, "guessed", {Type::int32}, {{"L", L}, {"16", words}});
    check(guesses_->second, "guesses", {Type::int32}, {{"L", L}, {"n", n}});
    return {data<std::int32_t>(guesses_->first), data<const std::int32_t>(guesses_->second), *n};
  }

  RoadShape checked_shape(std::pair<std::size_t, std::size_t> shape,
                          std::pair<std::size_t, std::size_t> experts, const Residency& residency) {
    const auto [hidden, inner] = shape;
    const auto [n_experts, top_k] = experts;
    if (hidden == 0 || inner == 0 || hidden % kGroup || inner % kGroup)
      bad("shape: (" + std::to_string(hidden) + ", " + std::to_string(inner) +
          ") given, multiples of 32 needed");
    if (top_k == 0 || top_k > n_experts)
      bad("top_k: " + std::to_string(top_k) + " given, 1 to n_experts=" + std::to_string(n_experts) +
          " needed");
    std::optional<std::size_t> L, k = top_k, k1 = top_k + 1, H = hidden, words = kFlagWords;
    static constexpr const char* kFlags[] = {"routed", "listed", "summed"};
    for (std::size_t i = 0; i < 3; ++i)
      check(arrays_[2 + i], kFlags[i], {Type::int32}, {{"L", L}, {"16", words}});
    check(arrays_[5], "ids", {Type::int32}, {{"L", L}, {"k", k}});
    check(arrays_[6], "weights", {Type::float32}, {{"L", L}, {"k", k}});
    check(arrays_[7], "hits", {Type::int32}, {{"L", L}, {"1+k", k1}});
    check(arrays_[8], "hit_weights", {Type::float32}, {{"L", L}, {"k", k}});
    check(arrays_[9], "uploads", {Type::int32}, {{"L", L}, {"1+k", k1}});
    check(arrays_[10], "upload_weights", {Type::float32}, {{"L", L}, {"k", k}});
    check(arrays_[11], "hidden", {Type::bf16}, {{"L", L}, {"H", H}});
    check(arrays_[12], "sums", {Type::float32}, {{"L", L}, {"H", H}});
    std::optional<std::size_t> four = 4, one = 1;
    check(arrays_[13], "part", {Type::int32}, {{"L", L}, {"4", four}});
    check(arrays_[14], "part_weight", {Type::float32}, {{"L", L}, {"1", one}});
    if (*L * n_experts != residency.n_keys())
      bad("residency: n_keys " + std::to_string(residency.n_keys()) + " given, L=" + std::to_string(*L) +
          " times n_experts=" + std::to_string(n_experts) + " needed");
    return {*L, n_experts, top_k, hidden, inner};
  }

  Mailbox mailbox(std::uintptr_t uploaded, std::size_t uploaded_stride, std::uintptr_t one) const {
    return {data<std::int32_t>(arrays_[2]),
            data<std::int32_t>(arrays_[3]),
            data<std::int32_t>(arrays_[4]),
            data<const std::int32_t>(arrays_[5]),
            data<const float>(arrays_[6]),
            data<std::int32_t>(arrays_[7]),
            data<float>(arrays_[8]),
            data<std::int32_t>(arrays_[9]),
            data<float>(arrays_[10]),
            data<std::int32_t>(arrays_[13]),
            data<float>(arrays_[14]),
            data<const std::uint16_t>(arrays_[11]),
            data<float>(arrays_[12]),
            uploaded,
            uploaded_stride,
            one};
  }

  Stores stores(const RoadShape& shape, std::pair<std::uintptr_t, std::size_t> slab,
                const Residency& residency) const {
    std::optional<std::size_t> rows, stride, keys = residency.n_keys();
    check(arrays_[0], "ram", {Type::uint8}, {{"rows", rows}, {"stride", stride}});
    check(arrays_[1], "ram_rows", {Type::int32}, {{"n_keys", keys}});
    const std::size_t weights = 3 * shape.hidden * shape.inner;
    const std::size_t bytes = weights / 2 + weights / kGroup * sizeof(std::uint16_t);
    for (const std::size_t given : {*stride, slab.second})
      if (given < bytes)
        bad("stride: " + std::to_string(given) + " bytes given, at least an expert's " +
            std::to_string(bytes) + " needed");
    const auto* row_of = data<const std::int32_t>(arrays_[1]);
    for (std::size_t key = 0; key < *keys; ++key)
      if (row_of[key] < -1 || row_of[key] >= static_cast<std::int64_t>(*rows))
        bad("ram_rows[" + std::to_string(key) + "]: " + std::to_string(row_of[key]) +
            " given, -1 or a row of ram's " + std::to_string(*rows) + " needed");
    return {reinterpret_cast<std::uintptr_t>(arrays_[0].data()),
            *stride,
            *rows,
            row_of,
            slab.first,
            slab.second,
            bytes};
  }

  Arrays arrays_;
  std::optional<std::pair<Array, Array>> guesses_;
  std::optional<DecodeRoads> roads_;
};

using Extent =
    std::pair<std::vector<std::tuple<int, std::uint64_t, std::size_t>>, std::optional<std::uint64_t>>;

ColdReader make_cold(RamRows& rows, Reader& reader, const std::vector<Extent>& given) {
  std::vector<ColdReader::Extent> extents;
  for (const auto& [tuples, checksum] : given) {
    auto& extent = extents.emplace_back(std::vector<Run>{}, checksum);
    for (const auto& [file, offset, nbytes] : tuples) extent.runs.push_back({file, offset, nbytes});
  }
  return {rows, reader, std::move(extents)};
}

void register_cold(nb::module_& m) {
  nb::class_<ColdReader>(m, "ColdReader")
      .def(
          "__init__",
          [](ColdReader* self, RamRows& rows, Reader& reader, const std::vector<Extent>& extents) {
            new (self) ColdReader(make_cold(rows, reader, extents));
          },
          "rows"_a, "reader"_a, "extents"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def_prop_ro("failed", &ColdReader::failed);
}

void register_decode(nb::module_& m) {
  m.attr("ROAD_FIELDS") =
      nb::cast(std::vector<std::string>(LayerStats::kFields.begin(), LayerStats::kFields.end()));
  const auto& ahead_fields = AheadUploads::Counts::kFields;
  m.attr("AHEAD_FIELDS") = nb::cast(std::vector<std::string>(ahead_fields.begin(), ahead_fields.end()));
  using Sizes = std::pair<std::size_t, std::size_t>;
  nb::class_<Roads>(m, "DecodeRoads")
      .def(nb::init<ThreadPool&, Residency&, Copier&, Sizes, Roads::Arrays,
                    std::pair<std::uintptr_t, std::size_t>,
                    std::tuple<std::uintptr_t, std::size_t, std::uintptr_t>, Sizes, RamRows*,
                    std::pair<double, double>, const std::optional<std::string>&, ColdReader*,
                    std::optional<std::pair<Array, Array>>>(),
           "pool"_a, "residency"_a, "copier"_a, "shape"_a, "arrays"_a, "slab"_a, "flags"_a, "experts"_a,
           "rows"_a.none(), "gbps"_a, "isa"_a.none(), "cold"_a.none(), "guesses"_a.none() = nb::none(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 10>(),
           nb::keep_alive<1, 13>())
      .def("run_token", &Roads::run_token, "ids"_a.none(), "timeout_s"_a, "guesses"_a.none() = nb::none())
      .def(
          "clear", [](Roads& r) { r.get().clear(); }, Unlocked())
      .def("abort", [](Roads& r) { r.get().abort(); })
      .def(
          "settle", [](Roads& r) { r.get().settle(); }, Unlocked())
      .def_prop_rw(
          "pcie_gbps", [](Roads& r) { return r.get().pcie.gbps(); },
          [](Roads& r, double gbps) { Roads::set(r.get().pcie, "pcie_gbps", gbps); })
      .def_prop_rw(
          "cpu_gbps", [](Roads& r) { return r.get().cpu.gbps(); },
          [](Roads& r, double gbps) { Roads::set(r.get().cpu, "cpu_gbps", gbps); })
      .def_prop_rw(
          "piece_bytes", [](Roads& r) { return r.get().ahead().piece_bytes; },
          [](Roads& r, std::size_t bytes) {
            if (bytes == 0) bad("piece_bytes: 0 given, more than 0 needed");
            r.get().ahead().piece_bytes = bytes;
          })
      .def_prop_ro("ahead", &Roads::ahead, nb::rv_policy::move)
      .def_prop_ro("stats", &Roads::stats, nb::rv_policy::move);
}

}  // namespace

void register_roads(nb::module_& m) {
  register_residency(m);
  register_rows(m);
  register_copiers(m);
  register_cold(m);
  register_decode(m);
}

}  // namespace moebox
