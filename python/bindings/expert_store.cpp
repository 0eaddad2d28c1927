/// MoeExpertStore: the experts of all layers in slow memory.

#include <pybind11/stl.h>

#include <tuple>

#include "calls.hpp"
#include "gguf.hpp"
#include "gil.hpp"
#include "lists.hpp"
#include "moesaic/error.hpp"
#include "offload.hpp"
#include "pickling.hpp"
#include "store_views.hpp"

namespace moesaic::python {
namespace {

using Store = std::shared_ptr<MoeExpertStore>;
using Pools = std::vector<std::shared_ptr<ExpertPool>>;

Store store_from_gguf(const py::object& source, std::optional<std::int64_t> memory_limit,
                      std::int32_t staging, std::int32_t io_threads, std::int32_t read_ahead,
                      std::optional<bool> direct_io) {
  const auto file = gguf_file(source, "MoeExpertStore.from_gguf");
  const StoreOptions options{memory_limit, staging, io_threads, read_ahead, direct_io};
  const Store store = [&] {
    const InterruptibleRelease release;
    return MoeExpertStore::from_gguf(file, options);
  }();
  remember_origin(store, reduced("gguf_store", source_of(file), given_options(options)));
  return store;
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
  const InterruptibleRelease release;
  return MoeExpertStore::from_arrays(views);
}

std::vector<RefreshResult> refresh_pools(MoeExpertStore& store, const Pools& pools,
                                         const std::vector<py::object>& lists, std::int64_t step,
                                         bool is_prefill_block, const std::string& mode) {
  constexpr const char* kOperation = "MoeExpertStore.refresh_pools";
  require_no_none(pools, kOperation, "pools", "ExpertPool");
  std::vector<Ids> ids;
  for (const py::object& one : lists) ids.push_back(import_id_list(one, kOperation, "ids"));
  std::vector<std::span<const std::int32_t>> spans;
  for (const Ids& one : ids) spans.push_back(id_span(one));
  const ReleasedGil release;
  return store.refresh_pools(pools, spans, step, is_prefill_block, parse_mode(mode, kOperation));
}

std::int64_t apply_pools(MoeExpertStore& store, const Pools& pools) {
  require_no_none(pools, "MoeExpertStore.apply", "pools", "ExpertPool");
  Call call;
  const InterruptibleRelease release;
  return store.apply(call.context, pools);
}

/// Another store would take as much memory again, and have none of the pools.
[[noreturn]] void refuse_copy(const MoeExpertStore&) {
  throw DTypeError(Problem{"copy", "MoeExpertStore", "an object without pools of its own",
                           "a store", "from_gguf opens another one"});
}

/// What these functions read waits for a forward that may need the GIL to see a signal.
template <class Read>
auto without_gil(Read&& read) {
  const ReleasedGil release;
  return read();
}

py::dict memory_of(const MoeExpertStore& store) {
  const StoreMemory memory = without_gil([&] { return store.memory(); });
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
  result["guessing"] = io.guessing;
  return result;
}

}  // namespace

void bind_expert_store(py::module_& m) {
  py::class_<MoeExpertStore, Store> type(m, "MoeExpertStore", py::is_final());
  reduce_by(type, [](py::handle self) { return origin_of(self.cast<Store>(), "MoeExpertStore"); });
  type.def_static("from_gguf", &store_from_gguf, py::arg("file"), py::kw_only(),
                  py::arg("memory_limit") = py::none(), py::arg("staging") = 0,
                  py::arg("io_threads") = 16, py::arg("read_ahead") = 4,
                  py::arg("direct_io") = py::none())
      .def_static("from_arrays", &from_arrays, py::arg("layers"),
                  py::arg("layer_indices") = py::none())
      .def_property_readonly("num_layers", &MoeExpertStore::num_layers)
      .def_property_readonly("layers",
                             [](const Store& store) {
                               std::vector<StoreLayer> layers;
                               for (std::int32_t i = 0; i < store->num_layers(); ++i) {
                                 layers.push_back({store, &store->layer(i)});
                               }
                               return layers;
                             })
      .def("refresh_pools", &refresh_pools, py::arg("pools"), py::arg("ids"), py::arg("step"),
           py::arg("is_prefill_block") = false, py::arg("mode") = "reuse")
      .def("apply", &apply_pools, py::arg("pools"))
      .def(
          "slot_map",
          [](const MoeExpertStore& store, std::int32_t i) {
            const std::vector<std::int32_t> map = without_gil([&] { return store.slot_map(i); });
            return py::array_t<std::int32_t>(static_cast<py::ssize_t>(map.size()), map.data());
          },
          py::arg("i"))
      .def("pools",
           [](const MoeExpertStore& store) {
             const ReleasedGil release;
             Pools pools;
             for (std::int32_t i = 0; i < store.num_layers(); ++i) pools.push_back(store.pool(i));
             return pools;
           })
      .def("profile",
           [](const py::object& store) {
             const py::object profile =
                 py::module_::import("moesaic.offload").attr("ExpertProfile");
             return call_python(profile.attr("of_store"), py::make_tuple(store));
           })
      .def(
          "prefetch",
          [](MoeExpertStore& store, std::int32_t block, const py::object& ids) {
            const Ids experts = import_id_list(ids, "MoeExpertStore.prefetch", "ids");
            const ReleasedGil release;
            store.prefetch(store.place_of(block), id_span(experts));
          },
          py::arg("layer"), py::arg("ids"))
      .def(
          "fitting_budgets",
          [](const MoeExpertStore& store, std::optional<std::int64_t> memory,
             std::int64_t reserve) {
            return store.fitting_budgets(backend_for(Device{}), reserve, memory);
          },
          py::arg("memory") = py::none(), py::kw_only(), py::arg("reserve") = 0)
      .def(
          "slot_bytes",
          [](const MoeExpertStore& store, const std::vector<std::int32_t>& budgets) {
            return store.slot_bytes(backend_for(Device{}), budgets);
          },
          py::arg("budgets"))
      .def_property_readonly("reading", &MoeExpertStore::reading)
      .def("memory", &memory_of)
      .def("io_stats", &io_of)
      .def("__copy__", &refuse_copy)
      .def(
          "__deepcopy__",
          [](const MoeExpertStore& store, const py::object&) { refuse_copy(store); },
          py::arg("memo"), py::pos_only())
      .def("__repr__", [](const MoeExpertStore& store) {
        return "moesaic.MoeExpertStore(num_layers=" + std::to_string(store.num_layers()) + ")";
      });
}

}  // namespace moesaic::python
