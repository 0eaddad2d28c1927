/// ExpertStack: how it is made, and what it says of itself.

#include "expert_stack.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <limits>

#include "arrays.hpp"
#include "dtypes.hpp"
#include "gguf.hpp"
#include "gil.hpp"
#include "load.hpp"
#include "moesaic/marlin_stack.hpp"
#include "moesaic/quantize_stack.hpp"
#include "pickling.hpp"
#include "stack_parts.hpp"

namespace moesaic::python {
namespace {

using Stack = std::shared_ptr<ExpertStack>;

Stack from_dense_stacks(const py::object& gate, const py::object& up, const py::object& down,
                        const py::object& quant, const py::object& weights,
                        const py::object& biases, const py::object& scales,
                        const std::string& device, const std::string& layout,
                        const py::object& progress) {
  constexpr const char* kOperation = "ExpertStack.from_dense_stacks";
  const RoleTypes types = import_role_types(quant, kOperation);
  ArrayRef importances[3];
  for_each_role(weights, "weights", kOperation, [&](Role role, py::handle value, const auto& name) {
    importances[static_cast<std::size_t>(role)] = import_f32(value, kOperation, name.c_str());
  });
  const auto importance_of = [&](Role role) {
    return importances[static_cast<std::size_t>(role)].read();
  };
  const auto import = [&](const py::object& array, const char* name) {
    ArrayRef ref = import_array(array, kOperation, name);
    require_float(ref, array, kOperation, name);
    return ref;
  };
  ArrayRef gate_ref;
  if (!gate.is_none()) gate_ref = import(gate, "gate");
  const ArrayRef up_ref = import(up, "up");
  const ArrayRef down_ref = import(down, "down");
  const ConstTensorView view = up_ref.read();
  Epilogues epilogues;
  // The library refuses arrays of another rank or size, and names them.
  if (view.rank == 3 && view.dim(0) <= std::numeric_limits<std::int32_t>::max()) {
    const StackShape shape{static_cast<std::int32_t>(view.dim(0)), view.dim(2), view.dim(1)};
    epilogues = import_epilogues(biases, scales, shape, kOperation);
  }
  Loading loading(kOperation, device, layout, std::nullopt, progress);
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(quantize_dense_stacks(
        gate_ref.read(), view, down_ref.read(), types, options, std::move(epilogues),
        {importance_of(Role::Gate), importance_of(Role::Up), importance_of(Role::Down)}));
  });
}

Stack from_encoded(const py::object& gate, const py::object& up, const py::object& down,
                   const py::object& biases, const py::object& scales, const std::string& device,
                   const std::string& layout) {
  constexpr const char* kOperation = "ExpertStack.from_encoded";
  const auto gate_role = encoded_role(gate, kOperation, "gate");
  const auto up_role = encoded_role(up, kOperation, "up");
  const auto down_role = encoded_role(down, kOperation, "down");
  Epilogues epilogues = import_epilogues(
      biases, scales, {up_role.num_experts, up_role.cols, up_role.rows}, kOperation);
  Loading loading(kOperation, device, layout, std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(
        ExpertStack::from_encoded(gate_role, up_role, down_role, options, std::move(epilogues)));
  });
}

Stack load_from_gguf(const py::object& source, std::int32_t layer,
                     const std::optional<std::string>& dequantize, const py::object& experts,
                     const std::string& device, const std::string& layout,
                     const py::object& weight_cache, const py::object& progress) {
  constexpr const char* kOperation = "ExpertStack.load_from_gguf";
  const auto file = gguf_file(source, kOperation);
  Loading loading(kOperation, device, layout, dequantize, progress);
  const auto kept = loading.keep(experts, kOperation);
  const py::object cache = loading.keep_panels(weight_cache, *file, kOperation);
  const Stack stack = loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(ExpertStack::load_from_gguf(file, layer, options));
  });
  log_report(kOperation, stack->report());
  const py::dict options(py::arg("dequantize") = dequantize, py::arg("experts") = kept,
                         py::arg("device") = device, py::arg("layout") = layout,
                         py::arg("weight_cache") = cache);
  remember_origin(stack, reduced("gguf_stack", source_of(file), layer, options));
  return stack;
}

Stack open_and_load(const std::filesystem::path& path, std::int32_t layer,
                    const std::optional<std::string>& dequantize, const py::object& experts,
                    const std::string& device, const std::string& layout,
                    const py::object& weight_cache, const py::object& progress) {
  return load_from_gguf(py::cast(path), layer, dequantize, experts, device, layout, weight_cache,
                        progress);
}

Stack from_marlin(const std::shared_ptr<MarlinExpertStack>& gate_up,
                  const std::shared_ptr<MarlinExpertStack>& down, const py::object& biases,
                  const py::object& scales, const std::string& device) {
  constexpr const char* kOperation = "ExpertStack.from_marlin";
  Epilogues epilogues = import_epilogues(
      biases, scales, {gate_up->num_experts(), gate_up->k(), gate_up->n_per_expert() / 2},
      kOperation);
  Loading loading(kOperation, device, "auto", std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(
        ExpertStack::from_marlin(gate_up, down, options, std::move(epilogues)));
  });
}

std::shared_ptr<MarlinExpertStack> marlin_of(const ExpertStack& stack, const std::string& role) {
  // Gate and up are columns of one stack, which either of them names.
  const Role one =
      role == "gate_up" ? Role::Up : parse_name<Role>(role, "ExpertStack.marlin", "role");
  return std::const_pointer_cast<MarlinExpertStack>(stack.marlin(one));
}

py::dict quants(const ExpertStack& stack) {
  py::dict types;
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    if (!stack.role(role).ref) continue;
    types[name_of(role)] = std::string(traits(stack.role(role).ref.type).name);
  }
  return types;
}

std::string stack_repr(const ExpertStack& stack) {
  std::string types;
  for (const auto& [role, type] : quants(stack))
    types += (types.empty() ? "" : "/") + std::string(py::str(type));
  std::int64_t rank = 0;
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    if (const auto& delta = stack.role(role).delta) rank = std::max(rank, delta->rank);
  }
  if (rank > 0) types += ", deltas of rank " + std::to_string(rank);
  return "moesaic.ExpertStack(num_experts=" + std::to_string(stack.num_experts()) +
         (stack.num_kept() < stack.num_experts()
              ? ", " + std::to_string(stack.num_kept()) + " of them in memory"
              : "") +
         ", hidden_size=" + std::to_string(stack.shape().hidden_size) +
         ", intermediate_size=" + std::to_string(stack.shape().intermediate_size) + ", " + types +
         ", " + std::to_string(stack.nbytes()) + " bytes)";
}

}  // namespace

void bind_expert_stack(py::module_& m) {
  StackClass type(m, "ExpertStack", py::is_final());
  reduce_by(type, [](py::handle self) { return origin_of(self.cast<Stack>(), "ExpertStack"); });
  type.def_static("from_dense_stacks", &from_dense_stacks, py::arg("gate"), py::arg("up"),
                  py::arg("down"), py::kw_only(), py::arg("quant") = py::none(),
                  py::arg("weights") = py::none(), py::arg("biases") = py::none(),
                  py::arg("scales") = py::none(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("progress") = py::none())
      .def_static("from_encoded", &from_encoded, py::arg("gate"), py::arg("up").none(false),
                  py::arg("down").none(false), py::kw_only(), py::arg("biases") = py::none(),
                  py::arg("scales") = py::none(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto")
      .def_static("load_from_gguf", &load_from_gguf, py::arg("file"), py::arg("layer"),
                  py::arg("dequantize") = py::none(), py::kw_only(),
                  py::arg("experts") = py::none(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("weight_cache") = false,
                  py::arg("progress") = py::none())
      .def_static("open_and_load", &open_and_load, py::arg("path"), py::arg("layer"),
                  py::arg("dequantize") = py::none(), py::kw_only(),
                  py::arg("experts") = py::none(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("weight_cache") = false,
                  py::arg("progress") = py::none())
      .def_static("from_marlin", &from_marlin, py::arg("gate_up").none(false),
                  py::arg("down").none(false), py::kw_only(), py::arg("biases") = py::none(),
                  py::arg("scales") = py::none(), py::arg("device") = "cpu")
      .def("marlin", &marlin_of, py::arg("role"))
      .def_property_readonly("num_experts", &ExpertStack::num_experts)
      .def_property_readonly("hidden_size",
                             [](const ExpertStack& s) { return s.shape().hidden_size; })
      .def_property_readonly("intermediate_size",
                             [](const ExpertStack& s) { return s.shape().intermediate_size; })
      .def_property_readonly("experts", &ExpertStack::kept_experts)
      .def_property_readonly("kind", &ExpertStack::kind)
      .def_property_readonly("gated", &ExpertStack::gated)
      .def_property_readonly("quants", &quants)
      .def_property_readonly("nbytes", &ExpertStack::nbytes)
      .def_property_readonly("bytes_per_expert", &ExpertStack::bytes_per_expert)
      .def_property_readonly("report", &ExpertStack::report)
      .def("__copy__", [](const Stack& self) { return self; })
      .def(
          "__deepcopy__", [](const Stack& self, const py::object&) { return self; },
          py::arg("memo"), py::pos_only())
      .def("__repr__", &stack_repr);
  define_parts(type);
  define_edits(type);
  define_products(type);
}

}  // namespace moesaic::python
