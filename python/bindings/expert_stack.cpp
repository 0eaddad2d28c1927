/// ExpertStack: how it is made, and what it says of itself.

#include "expert_stack.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <limits>
#include <tuple>

#include "arrays.hpp"
#include "gguf.hpp"
#include "gil.hpp"
#include "load.hpp"
#include "moesaic/marlin_stack.hpp"
#include "pickling.hpp"

namespace moesaic::python {
namespace {

using Stack = std::shared_ptr<ExpertStack>;

Stack from_dense_stacks(const py::object& gate, const py::object& up, const py::object& down,
                        const std::string& device, const std::string& layout) {
  constexpr const char* kOperation = "ExpertStack.from_dense_stacks";
  ArrayRef gate_ref;
  if (!gate.is_none()) gate_ref = import_array(gate, kOperation, "gate");
  const ArrayRef up_ref = import_array(up, kOperation, "up");
  const ArrayRef down_ref = import_array(down, kOperation, "down");
  Loading loading(kOperation, device, layout, std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(
        ExpertStack::from_dense_stacks(gate_ref.read(), up_ref.read(), down_ref.read(), options));
  });
}

/// (bytes, type name, (E, rows, cols)) as testing.quantize makes them.
using EncodedArgument = std::tuple<py::object, std::string, std::array<std::int64_t, 3>>;

ExpertStack::EncodedRole encoded_role(const std::optional<EncodedArgument>& argument,
                                      const char* name) {
  constexpr const char* kOperation = "ExpertStack.from_encoded";
  ExpertStack::EncodedRole role;
  if (!argument) return role;
  const auto& [data, type_name_text, shape] = *argument;
  const ArrayRef ref = import_array(data, kOperation, name);
  const auto type = quant_type_from_name(type_name_text);
  require<ConfigError>(type.has_value(), [&] {
    return Problem{
        kOperation, name, "a ggml type name such as Q4_K", "'" + type_name_text + "'", {}};
  });
  require<ShapeError>(is_dense(ref.read()), [&] {
    return Problem{kOperation, name, "dense bytes", describe(ref.read()), {}};
  });
  require<ShapeError>(shape[0] >= 0 && shape[0] <= std::numeric_limits<std::int32_t>::max(), [&] {
    return Problem{kOperation, name, "(E, rows, cols)", std::to_string(shape[0]) + " experts", {}};
  });
  role.type = *type;
  role.num_experts = static_cast<std::int32_t>(shape[0]);
  role.rows = shape[1];
  role.cols = shape[2];
  role.data = static_cast<const std::byte*>(ref.view.data);
  role.bytes = static_cast<std::size_t>(ref.view.num_elements()) * size_of(ref.view.dtype);
  role.owner = share_object(ref.keep);
  return role;
}

Stack from_encoded(const std::optional<EncodedArgument>& gate, const EncodedArgument& up,
                   const EncodedArgument& down, const std::string& device,
                   const std::string& layout) {
  const auto gate_role = encoded_role(gate, "gate");
  const auto up_role = encoded_role(up, "up");
  const auto down_role = encoded_role(down, "down");
  Loading loading("ExpertStack.from_encoded", device, layout, std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(
        ExpertStack::from_encoded(gate_role, up_role, down_role, options));
  });
}

Stack load_from_gguf(const py::object& source, std::int32_t layer,
                     const std::optional<std::string>& dequantize, const std::string& device,
                     const std::string& layout, const py::object& progress) {
  constexpr const char* kOperation = "ExpertStack.load_from_gguf";
  const auto file = gguf_file(source, kOperation);
  Loading loading(kOperation, device, layout, dequantize, progress);
  const Stack stack = loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(ExpertStack::load_from_gguf(file, layer, options));
  });
  log_report(kOperation, stack->report());
  const py::dict options(py::arg("dequantize") = dequantize, py::arg("device") = device,
                         py::arg("layout") = layout);
  remember_origin(stack, reduced("gguf_stack", source_of(file), layer, options));
  return stack;
}

Stack open_and_load(const std::filesystem::path& path, std::int32_t layer,
                    const std::optional<std::string>& dequantize, const std::string& device,
                    const std::string& layout, const py::object& progress) {
  return load_from_gguf(py::cast(path), layer, dequantize, device, layout, progress);
}

Stack from_marlin(const std::shared_ptr<MarlinExpertStack>& gate_up,
                  const std::shared_ptr<MarlinExpertStack>& down, const std::string& device) {
  Loading loading("ExpertStack.from_marlin", device, "auto", std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(ExpertStack::from_marlin(gate_up, down, options));
  });
}

std::shared_ptr<MarlinExpertStack> marlin_of(const ExpertStack& stack, const std::string& role) {
  // Gate and up are columns of one stack, which either of them names.
  const Role one =
      role == "gate_up" ? Role::Up : parse_name<Role>(role, "ExpertStack.marlin", "role");
  return std::const_pointer_cast<MarlinExpertStack>(stack.marlin(one));
}

py::array dequantize_matrix(const ExpertStack& stack, const std::string& role_name,
                            std::int32_t expert) {
  constexpr const char* kOperation = "ExpertStack.dequantize";
  const Role role = parse_name<Role>(role_name, kOperation, "role");
  const RoleWeights& weights = stack.role(role);
  require<ShapeError>(static_cast<bool>(weights.ref), [&] {
    return Problem{kOperation, "role", "a role of the stack", "gate of ungated experts", {}};
  });
  py::array_t<float> matrix = decoded_expert(weights.ref, expert, kOperation);
  if (weights.scale != nullptr) {
    const float factor = (*weights.scale)[static_cast<std::size_t>(expert)];
    float* const values = matrix.mutable_data();
    for (py::ssize_t i = 0; i < matrix.size(); ++i) values[i] *= factor;
  }
  return matrix;
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
  return "moesaic.ExpertStack(num_experts=" + std::to_string(stack.num_experts()) +
         ", hidden_size=" + std::to_string(stack.shape().hidden_size) +
         ", intermediate_size=" + std::to_string(stack.shape().intermediate_size) + ", " + types +
         ", " + std::to_string(stack.nbytes()) + " bytes)";
}

}  // namespace

py::array decoded_expert(const WeightRef& weight, std::int32_t expert, const char* operation) {
  require<ShapeError>(expert >= 0 && expert < weight.num_experts, [&] {
    return Problem{operation,
                   "expert",
                   "0 to " + std::to_string(weight.num_experts - 1),
                   std::to_string(expert),
                   {}};
  });
  py::array_t<float> out({weight.rows, weight.cols});
  float* to = out.mutable_data();
  const InterruptibleRelease release;
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    Interrupt::check();
    dequantize_expert_row(weight, expert, row, to + row * weight.cols);
  }
  return out;
}

void bind_expert_stack(py::module_& m) {
  StackClass type(m, "ExpertStack", py::is_final());
  reduce_by(type,
            [](py::handle self) { return origin_of(self.cast<const Stack&>(), "ExpertStack"); });
  type.def_static("from_dense_stacks", &from_dense_stacks, py::arg("gate"), py::arg("up"),
                  py::arg("down"), py::kw_only(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto")
      .def_static("from_encoded", &from_encoded, py::arg("gate"), py::arg("up"), py::arg("down"),
                  py::kw_only(), py::arg("device") = "cpu", py::arg("layout") = "auto")
      .def_static("load_from_gguf", &load_from_gguf, py::arg("file"), py::arg("layer"),
                  py::arg("dequantize") = py::none(), py::kw_only(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("progress") = py::none())
      .def_static("open_and_load", &open_and_load, py::arg("path"), py::arg("layer"),
                  py::arg("dequantize") = py::none(), py::kw_only(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("progress") = py::none())
      .def_static("from_marlin", &from_marlin, py::arg("gate_up").none(false),
                  py::arg("down").none(false), py::kw_only(), py::arg("device") = "cpu")
      .def("marlin", &marlin_of, py::arg("role"))
      .def_property_readonly("num_experts", &ExpertStack::num_experts)
      .def_property_readonly("hidden_size",
                             [](const ExpertStack& s) { return s.shape().hidden_size; })
      .def_property_readonly("intermediate_size",
                             [](const ExpertStack& s) { return s.shape().intermediate_size; })
      .def_property_readonly("kind", &ExpertStack::kind)
      .def_property_readonly("gated", &ExpertStack::gated)
      .def_property_readonly("quants", &quants)
      .def_property_readonly("nbytes", &ExpertStack::nbytes)
      .def_property_readonly("bytes_per_expert", &ExpertStack::bytes_per_expert)
      .def_property_readonly("report", &ExpertStack::report)
      .def("dequantize", &dequantize_matrix, py::arg("role"), py::arg("expert"))
      .def("__copy__", [](const Stack& self) { return self; })
      .def(
          "__deepcopy__", [](const Stack& self, const py::object&) { return self; },
          py::arg("memo"), py::pos_only())
      .def("__repr__", &stack_repr);
  define_products(type);
}

}  // namespace moesaic::python
