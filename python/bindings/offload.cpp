#include "offload.hpp"

#include <pybind11/stl.h>

#include <tuple>

#include "calls.hpp"
#include "layer.hpp"
#include "load.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::python {
namespace {

using Store = std::shared_ptr<MoeExpertStore>;
using Pools = std::vector<std::shared_ptr<ExpertPool>>;

/// Views of a store keep it alive.
struct LayerObjectOfStore {
  Store store;
  const LayerMoeWeights* weights;
};
struct RoleObject {
  Store store;
  RoleView view;
};

Store from_gguf(const std::shared_ptr<GgufFile>& file, std::optional<std::int64_t> memory_limit,
                std::int32_t staging, std::int32_t io_threads, std::int32_t read_ahead) {
  const StoreOptions options{memory_limit, staging, io_threads, read_ahead};
  const py::gil_scoped_release release;
  return MoeExpertStore::from_gguf(file, options);
}

Store from_arrays(const std::vector<std::tuple<py::object, py::object, py::object>>& layers,
                  const std::optional<std::vector<std::int32_t>>& layer_indices) {
  constexpr const char* kOperation = "MoeExpertStore.from_arrays";
  require<ShapeError>(!layer_indices || layer_indices->size() == layers.size(), [&] {
    return Problem{kOperation,
                   "layer_indices",
                   std::to_string(layers.size()) + ", one a layer",
                   std::to_string(layer_indices->size()),
                   {}};
  });
  std::vector<ArrayRef> arrays;
  std::vector<MoeExpertStore::ArrayLayer> views;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    MoeExpertStore::ArrayLayer& view = views.emplace_back();
    view.layer_index = layer_indices ? (*layer_indices)[i] : static_cast<std::int32_t>(i);
    const auto& [gate, up, down] = layers[i];
    const auto import = [&](const py::object& array, const char* name) {
      return arrays.emplace_back(import_array(array, kOperation, name)).read();
    };
    if (!gate.is_none()) view.gate = import(gate, "gate");
    view.up = import(up, "up");
    view.down = import(down, "down");
  }
  const py::gil_scoped_release release;
  return MoeExpertStore::from_arrays(views);
}

/// The store's bytes as numpy sees them: f32 [.., k, n] (a transposed view), else encoded bytes.
py::array view_array(const RoleObject& role, std::span<const std::byte> bytes, bool one) {
  const RoleView& view = role.view;
  if (view.ref().type != QuantType::F32) {
    const auto size = static_cast<std::int64_t>(bytes.size());
    return numpy_view(DType::U8, {size}, bytes.data(), role.store);
  }
  if (one) {
    return numpy_view(DType::F32, {view.n(), view.k()}, bytes.data(), role.store).attr("T");
  }
  return numpy_view(DType::F32, {view.num_experts(), view.n(), view.k()}, bytes.data(), role.store)
      .attr("swapaxes")(1, 2);
}

std::vector<RefreshResult> refresh_pools(MoeExpertStore& store, const Pools& pools,
                                         const std::vector<py::object>& captured_ids,
                                         std::int64_t step, bool is_prefill_block,
                                         const std::string& mode) {
  constexpr const char* kOperation = "MoeExpertStore.refresh_pools";
  std::vector<Ids> ids;
  for (const py::object& one : captured_ids) {
    ids.push_back(import_id_list(one, kOperation, "captured_ids"));
  }
  std::vector<std::span<const std::int32_t>> spans;
  for (const Ids& one : ids) spans.push_back(id_span(one));
  return store.refresh_pools(pools, spans, step, is_prefill_block, parse_mode(mode, kOperation));
}

std::int64_t apply(MoeExpertStore& store, const Pools& pools) {
  Call call;
  const py::gil_scoped_release release;
  return store.apply(call.context, pools);
}

py::dict memory_of(const MoeExpertStore& store) {
  const StoreMemory memory = store.memory();
  py::dict result;
  result["slots"] = memory.slots;
  result["staging"] = memory.staging;
  result["limit"] = memory.limit == 0 ? py::object(py::none()) : py::int_(memory.limit);
  return result;
}

py::dict io_of(const MoeExpertStore& store) {
  const IoStats io = store.io_stats();
  py::dict result;
  result["reads"] = io.reads;
  result["bytes"] = io.bytes;
  result["most_in_flight"] = io.most_in_flight;
  result["cached"] = io.cached;
  result["ahead"] = io.ahead;
  result["ahead_used"] = io.ahead_used;
  return result;
}

LayerObject layer_from_store(const Store& store, std::int32_t i,
                             const std::shared_ptr<ExpertPool>& pool, const std::string& on_miss,
                             const std::optional<MoeConfig>& config,
                             const py::object& router_weight,
                             const std::shared_ptr<ExpertStack>& shared,
                             const py::object& shared_gate, const std::string& device,
                             const std::string& precision) {
  constexpr const char* kOperation = "MoeLayer.from_store";
  const OnMiss miss = parse_name<OnMiss>(on_miss, kOperation, "on_miss");
  const auto default_precision = parse_precision(precision, kOperation);
  const LayerMoeWeights& weights = store->layer(i);
  const auto used =
      pool ? pool
           : std::make_shared<ExpertPool>(ExpertPool::all_resident(weights.stack->num_experts()));
  // Nobody else can apply a pool that is made here.
  const auto load_all = [&] {
    if (pool) return;
    Call call;
    const py::gil_scoped_release release;
    store->apply(call.context, i, used);
  };
  Loading loading(kOperation, device, "auto", std::nullopt, py::none());
  if (!config) {
    require<ConfigError>(router_weight.is_none() && !shared, [] {
      return Problem{kOperation, "router_weight and shared", "none: they come from the file",
                     "some", "give a config to make the layer from parts"};
    });
    auto layer = loading.run([&](const LoadOptions& options) {
      return std::make_shared<const MoeLayer>(store->make_layer(i, used, miss, options));
    });
    load_all();
    return {std::move(layer), default_precision};
  }
  MoeLayer::Parts parts;
  parts.stack = weights.stack;
  if (!router_weight.is_none()) {
    parts.router_weight = import_floats(router_weight, kOperation, "router_weight");
  }
  if (shared) {
    parts.shared.emplace(SharedExperts{*shared});
    if (!shared_gate.is_none()) {
      parts.shared->gate = import_floats(shared_gate, kOperation, "shared_gate");
    }
  }
  parts.residency = loading.run([&](const LoadOptions& options) {
    return store->residency(i, used, miss, *options.backend);
  });
  auto layer = std::make_shared<const MoeLayer>(*config, std::move(parts));
  load_all();
  return {std::move(layer), default_precision};
}

void bind_views(py::module_& m) {
  py::class_<RoleObject>(m, "ExpertRole", py::is_final(),
                         "One role of a layer in a store: y[n] = sum over k of x[k] * w[k, n].")
      .def_property_readonly(
          "num_experts", [](const RoleObject& r) { return r.view.num_experts(); }, "E.")
      .def_property_readonly(
          "k", [](const RoleObject& r) { return r.view.k(); }, "Input features.")
      .def_property_readonly(
          "n", [](const RoleObject& r) { return r.view.n(); }, "Output features.")
      .def_property_readonly(
          "quant", [](const RoleObject& r) { return std::string(traits(r.view.ref().type).name); },
          "Element type as ggml spells it.")
      .def_property_readonly(
          "expert_stride", [](const RoleObject& r) { return r.view.expert_stride(); },
          "Elements of as_slice from one expert to the next: k * n of F32, else bytes.")
      .def(
          "expert_slice",
          [](const RoleObject& r, std::int32_t expert) {
            return view_array(r, r.view.expert_slice(expert), true);
          },
          py::arg("expert"),
          "One expert without a copy: f32 [k, n], or its encoded bytes. Raises ShapeError.")
      .def(
          "as_slice", [](const RoleObject& r) { return view_array(r, r.view.as_slice(), false); },
          "All experts without a copy: f32 [E, k, n], or the encoded bytes. Raises\n"
          "UnsupportedError when they do not lie one behind the other.")
      .def("__repr__", [](const RoleObject& r) {
        return "moesaic.ExpertRole(num_experts=" + std::to_string(r.view.num_experts()) +
               ", k=" + std::to_string(r.view.k()) + ", n=" + std::to_string(r.view.n()) + ")";
      });

  const auto role = [](const LayerObjectOfStore& l, const RoleView& view) -> py::object {
    if (!view) return py::none();
    return py::cast(RoleObject{l.store, view});
  };
  py::class_<LayerObjectOfStore>(m, "LayerMoeWeights", py::is_final(),
                                 "The experts of one layer in a store.")
      .def_property_readonly(
          "layer_index", [](const LayerObjectOfStore& l) { return l.weights->layer_index; },
          "Block number in the model.")
      .def_property_readonly(
          "gate", [role](const LayerObjectOfStore& l) { return role(l, l.weights->gate); },
          "ExpertRole with k = H, n = I; None for ungated experts.")
      .def_property_readonly(
          "up", [role](const LayerObjectOfStore& l) { return role(l, l.weights->up); },
          "ExpertRole with k = H, n = I.")
      .def_property_readonly(
          "down", [role](const LayerObjectOfStore& l) { return role(l, l.weights->down); },
          "ExpertRole with k = I, n = H.")
      .def_property_readonly(
          "expert_bytes", [](const LayerObjectOfStore& l) { return l.weights->expert_bytes; },
          "Of one expert, all roles, as stored.")
      .def_property_readonly(
          "stack",
          [](const LayerObjectOfStore& l) {
            return std::const_pointer_cast<ExpertStack>(l.weights->stack);
          },
          "ExpertStack, as stored.")
      .def("__repr__", [](const LayerObjectOfStore& l) {
        return "moesaic.LayerMoeWeights(layer_index=" + std::to_string(l.weights->layer_index) +
               ", expert_bytes=" + std::to_string(l.weights->expert_bytes) + ")";
      });
}

}  // namespace

void bind_offload(py::module_& m) {
  bind_views(m);
  py::class_<MoeExpertStore, Store>(
      m, "MoeExpertStore", py::is_final(),
      "Experts of all MoE layers in slow memory: a mapped file, or with a memory limit one that "
      "is\n"
      "read with several requests in flight. Thread safe; not for use in a forked child.")
      .def_static(
          "from_gguf", &from_gguf, py::arg("file").none(false), py::kw_only(),
          py::arg("memory_limit") = py::none(), py::arg("staging") = 0, py::arg("io_threads") = 8,
          py::arg("read_ahead") = 4,
          "Every MoE layer of a GgufFile as stored, no copy. With memory_limit (bytes) slots and\n"
          "staging together stay below it; staging: experts between disk and slots (0: 16 or\n"
          "fewer); read_ahead: experts of the next layer asked for ahead, by routing history.\n\n"
          "Raises FormatError, UnsupportedError, ConfigError.")
      .def_static(
          "from_arrays", &from_arrays, py::arg("layers"), py::arg("layer_indices") = py::none(),
          "From (gate [E, H, I] or None, up [E, H, I], down [E, I, H]) of each layer, f32, f16 or\n"
          "bf16: the grouped-matmul layout, converted once. Raises ShapeError, DTypeError.")
      .def_property_readonly("num_layers", &MoeExpertStore::num_layers, "MoE layers.")
      .def_property_readonly(
          "layers",
          [](const Store& store) {
            std::vector<LayerObjectOfStore> layers;
            for (std::int32_t i = 0; i < store->num_layers(); ++i) {
              layers.push_back({store, &store->layer(i)});
            }
            return layers;
          },
          "LayerMoeWeights of each layer.")
      .def("refresh_pools", &refresh_pools, py::arg("pools"), py::arg("captured_ids"),
           py::arg("step"), py::arg("is_prefill_block") = false, py::arg("mode") = "reuse",
           "Refresh each pool that is due by its own policy from its layer's ids of the last\n"
           "forward; returns a RefreshResult per layer. Nothing moves before apply.\n\n"
           "Raises ShapeError on lists of unequal length and ids out of range; then no pool has\n"
           "changed.")
      .def("apply", &apply, py::arg("pools"),
           "Make the slots hold what the pools say, moving only what changed; returns the bytes\n"
           "moved. Forwards may run meanwhile in other threads.\n\n"
           "Raises ShapeError, ConfigError (another pool in use, memory_limit), OSError,\n"
           "FormatError; what was not loaded then counts as not resident.")
      .def(
          "slot_map",
          [](const MoeExpertStore& store, std::int32_t i) {
            const std::vector<std::int32_t> map = store.slot_map(i);
            return py::array_t<std::int32_t>(static_cast<py::ssize_t>(map.size()), map.data());
          },
          py::arg("i"), "int32 [E]: what is in fast memory now, -1 = not; empty before any use.")
      .def(
          "pools",
          [](const MoeExpertStore& store) {
            Pools pools;
            for (std::int32_t i = 0; i < store.num_layers(); ++i) pools.push_back(store.pool(i));
            return pools;
          },
          "The ExpertPool that each layer runs with, or None.")
      .def(
          "profile",
          [](const py::object& store) {
            return py::module_::import("moesaic.offload")
                .attr("ExpertProfile")
                .attr("of_store")(store);
          },
          "ExpertProfile of what its layers' forwards used: print, save, plot, warm pools.")
      .def("memory", &memory_of, "Bytes: slots, staging, limit (None without one).")
      .def("io_stats", &io_of,
           "Of the disk tier: reads, bytes, most_in_flight, cached, ahead, ahead_used.")
      .def("__repr__", [](const MoeExpertStore& store) {
        return "moesaic.MoeExpertStore(num_layers=" + std::to_string(store.num_layers()) + ")";
      });

  auto layer = py::reinterpret_borrow<py::class_<LayerObject>>(m.attr("MoeLayer"));
  layer.def_static(
      "from_store", &layer_from_store, py::arg("store").none(false), py::arg("i"),
      py::arg("pool") = py::none(), py::arg("on_miss") = "compute", py::kw_only(),
      py::arg("config") = py::none(), py::arg("router_weight") = py::none(),
      py::arg("shared") = py::none(), py::arg("shared_gate") = py::none(),
      py::arg("device") = "cpu", py::arg("precision") = "auto",
      "Layer i of a MoeExpertStore, with as many experts in fast memory as the pool's budget\n"
      "(None: all, loaded now). A missing expert is computed where it lies ('compute'), brought\n"
      "to fast memory first ('stage') or an error ('error'); the results are those of a layer\n"
      "with everything resident. Experts are cold until store.apply or, with 'stage', until\n"
      "needed.\n"
      "Router and shared experts come from the file; a store of arrays needs a config.\n\n"
      "Raises ShapeError, ConfigError, UnsupportedError, DeviceError, FormatError.");
}

}  // namespace moesaic::python
