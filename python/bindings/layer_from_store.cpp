/// MoeLayer.from_store: a layer whose experts are not all in fast memory.

#include <pybind11/stl.h>

#include "calls.hpp"
#include "checkpoints.hpp"
#include "gil.hpp"
#include "layer_parts.hpp"
#include "load.hpp"
#include "offload.hpp"
#include "values.hpp"

namespace moesaic::python {
namespace {

using Store = std::shared_ptr<MoeExpertStore>;

/// What a checkpoint has of a layer beside its experts, and the config that it says or was given.
std::pair<MoeConfig, MoeLayer::Parts> parts_of_checkpoint(const py::object& checkpoint,
                                                          const LayerMoeWeights& weights,
                                                          const std::optional<MoeConfig>& given,
                                                          std::optional<std::int32_t> top_k,
                                                          Loading& loading, const char* operation) {
  const auto found = call_python(checkpoint.attr("layer_arguments"),
                                 py::make_tuple(weights.layer_index, given, top_k))
                         .cast<py::dict>();
  const auto argument = [&](const char* name) -> py::object {
    return found.contains(name) ? py::object(found[name]) : py::none();
  };
  LayerArguments arguments{argument("router_weight"), argument("shared"),
                           argument("shared_gate"),   argument("latent"),
                           argument("latent_norm"),   argument("input_norm"),
                           argument("router_norm"),   argument("token_experts")};
  if (!arguments.shared.is_none()) {
    arguments.shared = py::cast(finish_gathered(loading, operation, arguments.shared));
  }
  const auto config = argument("config").cast<MoeConfig>();
  return {config, import_parts(weights.stack, config, arguments)};
}

LayerObject layer_from_store(const Store& store, std::int32_t block,
                             const std::shared_ptr<ExpertPool>& pool, const std::string& on_miss,
                             const std::optional<MoeConfig>& given,
                             std::optional<std::int32_t> top_k, const py::object& router_weight,
                             const py::object& shared, const py::object& shared_gate,
                             const std::string& device, const std::string& precision) {
  constexpr const char* kOperation = "MoeLayer.from_store";
  const OnMiss miss = parse_name<OnMiss>(on_miss, kOperation, "on_miss");
  const auto default_precision = parse_precision(precision, kOperation);
  const std::int32_t i = store->place_of(block);
  const LayerMoeWeights& weights = store->layer(i);
  const auto used =
      pool ? pool
           : std::make_shared<ExpertPool>(ExpertPool::all_resident(weights.stack->num_experts()));
  // A pool made here is unknown to the caller, whose apply() would otherwise load the experts.
  const auto load_all = [&] {
    if (pool) return;
    Call call;
    const InterruptibleRelease release;
    store->apply(call.context, i, used);
  };
  Loading loading(kOperation, device, "auto", std::nullopt, py::none());
  const auto& file = store->file();
  std::optional<MoeConfig> config = given;
  if (top_k && (given || file)) {
    config = with_top_k(given ? *given : MoeConfig::from_gguf(*file, weights.layer_index), *top_k,
                        kOperation);
  }
  const bool has_parts = !router_weight.is_none() || !shared.is_none();
  const py::object checkpoint = checkpoint_of(store);
  if (!checkpoint.is_none() && !has_parts) {
    auto [found, parts] =
        parts_of_checkpoint(checkpoint, weights, given, top_k, loading, kOperation);
    parts.residency = loading.run([&](const LoadOptions& options) {
      return store->residency(i, used, miss, *options.backend);
    });
    auto layer = std::make_shared<const MoeLayer>(std::move(found), std::move(parts));
    load_all();
    return {std::move(layer), default_precision};
  }
  if (!config || (file && !has_parts)) {
    require<ConfigError>(!has_parts, [] {
      return Problem{kOperation, "router_weight and shared", "none: they come from the file",
                     "some", "give a config to make the layer from parts"};
    });
    auto layer = loading.run([&](const LoadOptions& options) {
      return std::make_shared<const MoeLayer>(store->make_layer(i, used, miss, options, config));
    });
    load_all();
    return {std::move(layer), default_precision};
  }
  MoeLayer::Parts parts;
  parts.stack = weights.stack;
  if (!router_weight.is_none()) {
    parts.router_weight = import_floats(router_weight, kOperation, "router_weight");
  }
  parts.shared = import_shared(shared, shared_gate, config->hidden_size, kOperation);
  parts.residency = loading.run([&](const LoadOptions& options) {
    return store->residency(i, used, miss, *options.backend);
  });
  auto layer = std::make_shared<const MoeLayer>(*config, std::move(parts));
  load_all();
  return {std::move(layer), default_precision};
}

}  // namespace

void bind_layer_from_store(py::module_& m) {
  auto layer = py::reinterpret_borrow<py::class_<LayerObject>>(m.attr("MoeLayer"));
  layer.def_static("from_store", &layer_from_store, py::arg("store").none(false), py::arg("layer"),
                   py::arg("pool") = py::none(), py::arg("on_miss") = "compute", py::kw_only(),
                   py::arg("config") = py::none(), py::arg("top_k") = py::none(),
                   py::arg("router_weight") = py::none(), py::arg("shared") = py::none(),
                   py::arg("shared_gate") = py::none(), py::arg("device") = "cpu",
                   py::arg("precision") = "auto");
}

}  // namespace moesaic::python
