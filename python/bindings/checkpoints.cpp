#include "checkpoints.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.hpp"
#include "gil.hpp"
#include "layer.hpp"
#include "load.hpp"
#include "moesaic/marlin_stack.hpp"
#include "pickling.hpp"
#include "quant.hpp"
#include "stack_parts.hpp"
#include "text.hpp"
#include "values.hpp"
#include "weights/builder.hpp"

// Hugging Face checkpoints: Python reads names, configurations and files, and puts experts one by
// one into a builder; what comes here is the end of such a load.

namespace moesaic::python {
namespace {

using Stack = std::shared_ptr<ExpertStack>;
using weights::Builder;

/// (type name, source, decision, reason), as StackBuilder takes a role.
using RoleArgument = std::tuple<std::string, Text, Text, Text>;

Builder::RoleSpec role_spec(const RoleArgument& argument) {
  const auto& [type_text, source, decision, reason] = argument;
  return {.type = parse_quant_type(type_text, "StackBuilder", "type"),
          .source = source.bytes,
          .decision = decision.bytes,
          .reason = reason.bytes};
}

std::unique_ptr<Builder> make_stack_builder(std::int32_t num_experts, std::int64_t hidden_size,
                                            std::int64_t intermediate_size,
                                            const std::optional<RoleArgument>& gate,
                                            const RoleArgument& up, const RoleArgument& down,
                                            std::optional<std::vector<std::int32_t>> experts) {
  std::optional<Builder::RoleSpec> gate_spec;
  if (gate) gate_spec = role_spec(*gate);
  return std::make_unique<Builder>(StackShape{num_experts, hidden_size, intermediate_size},
                                   gate_spec ? &*gate_spec : nullptr, role_spec(up),
                                   role_spec(down), std::move(experts));
}

void add_expert(Builder& builder, const std::string& role_name, std::int32_t expert,
                const py::object& rows, float scale, const py::object& bias) {
  constexpr const char* kOperation = "StackBuilder.add";
  const Role role = parse_name<Role>(role_name, kOperation, "role");
  ArrayRef ref;
  std::span<const std::byte> bytes;
  if (!rows.is_none()) {
    ref = import_array(rows, kOperation, "rows");
    require<ShapeError>(is_dense(ref.read()), [&] {
      return Problem{kOperation, "rows", "dense rows", describe(ref.read()), {}};
    });
    bytes = {static_cast<const std::byte*>(ref.view.data),
             static_cast<std::size_t>(ref.view.num_elements()) * size_of(ref.view.dtype)};
  }
  std::vector<float> values;
  if (!bias.is_none()) values = import_floats(bias, kOperation, "bias");
  const InterruptibleRelease release;
  builder.add(role, expert, bytes, scale, values);
}

}  // namespace

Stack finish_gathered(Loading& loading, const char* operation, const py::handle& gathered) {
  Stack stack;
  if (py::isinstance<py::tuple>(gathered)) {
    using Marlin = std::shared_ptr<MarlinExpertStack>;
    const auto [gate_up, down, num_experts, ids] = gathered.cast<
        std::tuple<Marlin, Marlin, std::int32_t, std::optional<std::vector<std::int32_t>>>>();
    stack = loading.run([&, gate_up = gate_up, down = down, num_experts = num_experts,
                         ids = ids](const LoadOptions& options) {
      ExpertStack all = ExpertStack::from_marlin(gate_up, down, options);
      if (!ids) return std::make_shared<ExpertStack>(std::move(all));
      const auto start = weights::Clock::now();
      return std::make_shared<ExpertStack>(weights::finish_kept(
          weights::parts_of(all), weights::keep_experts(operation, *ids, num_experts), options,
          start));
    });
  } else {
    Builder& builder = gathered.cast<Builder&>();
    stack = loading.run([&](const LoadOptions& options) {
      return std::make_shared<ExpertStack>(std::move(builder).build(options));
    });
  }
  log_report(operation, stack->report());
  return stack;
}

py::object checkpoint_loader(const char* name) {
  return py::module_::import("moesaic.safetensors").attr(name);
}

namespace {

/// What Python calls after each matrix, with a name and the bytes done and to do.
py::cpp_function step_of(Loading& loading) {
  return {[&loading](const Text& name, std::int64_t done, std::int64_t total) {
    loading.step({done, total, name.bytes});
  }};
}

/// What Python calls with a StackBuilder and the origins of its roles, (tensor, file, selection) by
/// name, before it reads any rows; it returns the names of the roles that the weight cache has. None
/// where nothing is kept.
py::object lookup_of(Loading& loading) {
  if (!loading.keeps_panels()) return py::none();
  using Origins = std::map<std::string, std::tuple<Text, std::uint64_t, std::uint64_t>>;
  return py::cpp_function([&loading](Builder& builder, const Origins& by_name) {
    std::vector<Builder::RoleOrigin> origins;
    for (const auto& [name, origin] : by_name) {
      const auto& [tensor, file, selection] = origin;
      origins.push_back({parse_name<Role>(name, "StackBuilder", "role"),
                         {.file = file, .tensor = tensor.bytes, .selection = selection}});
    }
    const std::vector<Role> found = loading.run(
        [&](const LoadOptions& options) { return builder.find_cached(origins, options); });
    std::vector<std::string> names;
    for (const Role role : found) names.emplace_back(name_of(role));
    return names;
  });
}

/// The types to encode roles in, by their names; None where all stay as they are. Throws ConfigError.
py::object types_by_role(const py::object& quant, const char* operation) {
  if (quant.is_none()) return py::none();
  const RoleTypes types = import_role_types(quant, operation);
  py::dict by_role;
  for (const auto& [role, type] :
       {std::pair{Role::Gate, types.gate}, {Role::Up, types.up}, {Role::Down, types.down}}) {
    if (type) by_role[name_of(role)] = std::string(traits(*type).name);
  }
  return by_role;
}

/// Where the repacked weights of a checkpoint are kept.
Loading::CacheFolder cache_folder_of(const py::object& path) {
  return [path](const std::filesystem::path& parent) {
    return call_python(checkpoint_loader("cache_folder"),
                       py::make_tuple(path, path_to_python(parent)))
        .cast<std::filesystem::path>();
  };
}

/// What a load notes its files in, to tell them from later ones of the same names.
py::object checkpoint_source(const py::object& path, std::int32_t layer,
                             const std::optional<py::str>& prefix) {
  return call_python(pickling_function("CheckpointSource"), py::make_tuple(path, layer, prefix));
}

Stack load_stack(const py::object& path, std::int32_t layer,
                 const std::optional<std::string>& dequantize, const std::optional<py::str>& prefix,
                 const py::object& quant, const py::object& experts, const std::string& device,
                 const py::object& weight_cache, const py::object& progress) {
  constexpr const char* kOperation = "ExpertStack.load_from_safetensors";
  Loading loading(kOperation, device, "auto", dequantize, progress);
  const auto kept = loading.keep(experts, kOperation);
  const py::object cache = loading.keep_panels(weight_cache, cache_folder_of(path), kOperation);
  const py::object types = types_by_role(quant, kOperation);
  require<ConfigError>(types.is_none() || !dequantize, [&] {
    return Problem{kOperation, "quant", "None beside dequantize", "types", "leave out one of both"};
  });
  const py::object source = checkpoint_source(path, layer, prefix);
  const py::object gathered = call_python(
      checkpoint_loader("gather_experts"),
      py::make_tuple(path, layer, step_of(loading), dequantize.has_value(), prefix, source, kept,
                     loading.multiplies(QuantType::E4M3), lookup_of(loading), types));
  const Stack stack = finish_gathered(loading, kOperation, gathered);
  const py::dict options(py::arg("dequantize") = dequantize, py::arg("prefix") = prefix,
                         py::arg("quant") = types, py::arg("experts") = kept,
                         py::arg("device") = device, py::arg("weight_cache") = cache);
  remember_origin(stack, reduced("checkpoint_stack", source, layer, options));
  return stack;
}

py::object load_layer(const py::object& path, std::int32_t layer,
                      const std::optional<std::string>& dequantize,
                      const std::optional<py::str>& prefix, const std::optional<MoeConfig>& config,
                      std::optional<std::int32_t> top_k, const py::object& experts,
                      const std::string& device, const std::string& precision,
                      const py::object& weight_cache, const py::object& progress) {
  constexpr const char* kOperation = "MoeLayer.from_safetensors";
  Loading loading(kOperation, device, "auto", dequantize, progress);
  const auto kept = loading.keep(experts, kOperation);
  const py::object cache = loading.keep_panels(weight_cache, cache_folder_of(path), kOperation);
  // The arguments of MoeLayer by name, with stacks still in their builders.
  const py::object source = checkpoint_source(path, layer, prefix);
  const auto parts =
      call_python(checkpoint_loader("gather_layer"),
                  py::make_tuple(path, layer, step_of(loading), dequantize.has_value(), prefix,
                                 config, top_k, source, kept, loading.multiplies(QuantType::E4M3),
                                 lookup_of(loading)))
          .cast<py::dict>();
  for (const char* name : {"stack", "shared"}) {
    const py::object gathered = parts[name];
    if (!gathered.is_none()) parts[name] = finish_gathered(loading, kOperation, gathered);
  }
  parts["precision"] = precision;
  py::object made = py::type::of<LayerObject>()(**parts);
  const py::dict options(py::arg("dequantize") = dequantize, py::arg("prefix") = prefix,
                         py::arg("config") = config, py::arg("top_k") = top_k,
                         py::arg("experts") = kept, py::arg("device") = device,
                         py::arg("precision") = precision, py::arg("weight_cache") = cache);
  remember_layer(made.cast<const LayerObject&>().get(kOperation),
                 reduced("checkpoint_layer", source, layer, options));
  return made;
}

py::object config_from_hf(const py::object& config, std::int32_t layer) {
  return call_python(py::module_::import("moesaic.hf_config").attr("config_from_hf"),
                     py::make_tuple(config, layer));
}

/// Adds a static method to a class that another file made.
template <class Function, class... Extra>
void def_static(const py::object& type, const char* name, Function&& function,
                const Extra&... extra) {
  type.attr(name) = py::staticmethod(py::cpp_function(std::forward<Function>(function),
                                                      py::name(name), py::scope(type), extra...));
}

}  // namespace

void bind_checkpoints(py::module_& m) {
  py::class_<Builder>(m, "StackBuilder", py::is_final())
      .def(py::init(&make_stack_builder), py::arg("num_experts"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::kw_only(), py::arg("gate"), py::arg("up"),
           py::arg("down"), py::arg("experts") = py::none())
      .def("add", &add_expert, py::arg("role"), py::arg("expert"), py::arg("rows"),
           py::arg("scale") = 1.0F, py::arg("bias") = py::none());

  def_static(m.attr("MoeConfig"), "from_hf", &config_from_hf, py::arg("config"),
             py::arg("layer") = 0);
  def_static(m.attr("ExpertStack"), "load_from_safetensors", &load_stack, py::arg("path"),
             py::arg("layer"), py::arg("dequantize") = py::none(), py::kw_only(),
             py::arg("prefix") = py::none(), py::arg("quant") = py::none(),
             py::arg("experts") = py::none(), py::arg("device") = "cpu",
             py::arg("weight_cache") = false, py::arg("progress") = py::none());
  def_static(m.attr("MoeLayer"), "from_safetensors", &load_layer, py::arg("path"), py::arg("layer"),
             py::arg("dequantize") = py::none(), py::kw_only(), py::arg("prefix") = py::none(),
             py::arg("config") = py::none(), py::arg("top_k") = py::none(),
             py::arg("experts") = py::none(), py::arg("device") = "cpu",
             py::arg("precision") = "auto", py::arg("weight_cache") = false,
             py::arg("progress") = py::none());
}

}  // namespace moesaic::python
