#include "moesaic/expert_stack.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <limits>
#include <tuple>

#include "arrays.hpp"
#include "calls.hpp"
#include "devices.hpp"
#include "load.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/marlin_stack.hpp"
#include "routing.hpp"

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

Stack load_from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                     const std::optional<std::string>& dequantize, const std::string& device,
                     const std::string& layout, const py::object& progress) {
  constexpr const char* kOperation = "ExpertStack.load_from_gguf";
  Loading loading(kOperation, device, layout, dequantize, progress);
  const Stack stack = loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(ExpertStack::load_from_gguf(file, layer, options));
  });
  log_report(kOperation, stack->report());
  return stack;
}

Stack open_and_load(const std::filesystem::path& path, std::int32_t layer,
                    const std::optional<std::string>& dequantize, const std::string& device,
                    const std::string& layout, const py::object& progress) {
  constexpr const char* kOperation = "ExpertStack.open_and_load";
  Loading loading(kOperation, device, layout, dequantize, progress);
  const Stack stack = loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(ExpertStack::open_and_load(path, layer, options));
  });
  log_report(kOperation, stack->report());
  return stack;
}

Stack from_marlin(const std::shared_ptr<MarlinExpertStack>& gate_up,
                  const std::shared_ptr<MarlinExpertStack>& down, const std::string& device) {
  Loading loading("ExpertStack.from_marlin", device, "auto", std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<ExpertStack>(ExpertStack::from_marlin(gate_up, down, options));
  });
}

std::shared_ptr<MarlinExpertStack> marlin_of(const ExpertStack& stack, const std::string& role) {
  const Role place =
      role == "gate_up" ? Role::Up : parse_name<Role>(role, "ExpertStack.marlin", "role");
  return std::const_pointer_cast<MarlinExpertStack>(stack.marlin(place));
}

py::array dequantize(const ExpertStack& stack, const std::string& role_name, std::int32_t expert) {
  constexpr const char* kOperation = "ExpertStack.dequantize";
  const Role role = parse_name<Role>(role_name, kOperation, "role");
  const WeightRef& weight = stack.role(role).ref;
  require<ShapeError>(static_cast<bool>(weight), [&] {
    return Problem{kOperation, "role", "a role of the stack", "gate of ungated experts", {}};
  });
  require<ShapeError>(expert >= 0 && expert < stack.num_experts(), [&] {
    return Problem{kOperation,
                   "expert",
                   "0 to " + std::to_string(stack.num_experts() - 1),
                   std::to_string(expert),
                   {}};
  });
  py::array_t<float> out({weight.rows, weight.cols});
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  for (std::int64_t row = 0; row < weight.rows; ++row)
    dequantize_expert_row(weight, expert, row, to + row * weight.cols);
  return out;
}

std::int64_t rows_of(const ExpertStack& stack, Role role) {
  return role == Role::Down ? stack.shape().hidden_size : stack.shape().intermediate_size;
}

/// The shape of ids with `rows` behind it.
std::vector<std::int64_t> gemv_shape(const Ids& ids, std::int64_t rows, const char* operation) {
  require<ShapeError>(ids.view.rank == 1 || ids.view.rank == 2, [&] {
    return Problem{operation, "ids", "[k] or [T, k]", describe(ids.view), {}};
  });
  std::vector<std::int64_t> shape(ids.view.shape.begin(), ids.view.shape.begin() + ids.view.rank);
  shape.push_back(rows);
  return shape;
}

/// The one body of all gemv methods: run(call, x, ids, out).
template <class Run>
py::object gemv(const char* operation, const ExpertStack& stack, const py::object& x,
                const char* x_name, const py::object& ids, std::int64_t rows, const py::object& out,
                const std::optional<std::string>& precision, const py::object& stream, Run&& run) {
  const Place place = call_place(stack.device(), stream, x, operation);
  const ArrayRef in = import_array(x, operation, x_name, place);
  const Ids experts = import_ids(ids, operation, "ids", place);
  Result result(x, in, DType::F32, gemv_shape(experts, rows, operation), out, operation, false,
                place);
  require_disjoint(result.view(), in.read(), operation, x_name);
  require_disjoint(result.view(), experts.view, operation, "ids");
  Call call(parse_precision(precision, operation), place.device);
  call.context.set_stream(place.stream);
  {
    const py::gil_scoped_release release;
    run(call.context, in.read(), experts.view, result.view());
  }
  return result.finish();
}

py::object gemv_role(const char* operation, Role role, const ExpertStack& stack,
                     const py::object& x, const py::object& ids, const py::object& out,
                     const std::optional<std::string>& precision, const py::object& stream) {
  return gemv(operation, stack, x, role == Role::Down ? "h" : "x", ids, rows_of(stack, role), out,
              precision, stream,
              [&](Context& context, const ConstTensorView& in, const ConstTensorView& experts,
                  const TensorView& to) { expert_gemv(context, stack, role, in, experts, to); });
}

py::object gemv_gate_up_silu(const ExpertStack& stack, const py::object& x, const py::object& ids,
                             const py::object& out, const std::optional<std::string>& precision,
                             const py::object& stream) {
  return gemv("ExpertStack.gemv_gate_up_silu", stack, x, "x", ids, stack.shape().intermediate_size,
              out, precision, stream,
              [&](Context& context, const ConstTensorView& in, const ConstTensorView& experts,
                  const TensorView& to) {
                expert_gemv_gate_up(context, stack, Activation{}, in, experts, to);
              });
}

py::object gemm_role(const char* operation, Role role, const ExpertStack& stack,
                     const py::object& x, const PlanObject& plan, const py::object& out,
                     const std::optional<std::string>& precision, const py::object& stream) {
  const char* x_name = role == Role::Down ? "h" : "x";
  const Place place = call_place(stack.device(), stream, x, operation);
  const ArrayRef in = import_array(x, operation, x_name, place);
  const auto held = plan.value;
  Result result(x, in, DType::F32, {held->num_pairs(), rows_of(stack, role)}, out, operation, false,
                place);
  require_disjoint(result.view(), in.read(), operation, x_name);
  Call call(parse_precision(precision, operation), place.device);
  call.context.set_stream(place.stream);
  {
    const py::gil_scoped_release release;
    expert_gemm(call.context, stack, role, in.read(), *held, result.view());
  }
  return result.finish();
}

/// The named methods: one-line forwards to expert_gemv and expert_gemm.
void define_products(py::class_<ExpertStack, Stack>& type) {
  const auto def_gemv = [&](const char* name, const char* operation, Role role, const char* x,
                            const char* help) {
    type.def(
        name,
        [operation, role](const ExpertStack& stack, const py::object& in, const py::object& ids,
                          const py::object& out, const std::optional<std::string>& precision,
                          const py::object& stream) {
          return gemv_role(operation, role, stack, in, ids, out, precision, stream);
        },
        py::arg(x), py::arg("ids"), py::kw_only(), py::arg("out") = py::none(),
        py::arg("precision") = py::none(), py::arg("stream") = py::none(), help);
  };
  const auto def_gemm = [&](const char* name, const char* operation, Role role, const char* x,
                            const char* help) {
    type.def(
        name,
        [operation, role](const ExpertStack& stack, const py::object& in, const PlanObject& plan,
                          const py::object& out, const std::optional<std::string>& precision,
                          const py::object& stream) {
          return gemm_role(operation, role, stack, in, plan, out, precision, stream);
        },
        py::arg(x), py::arg("plan"), py::kw_only(), py::arg("out") = py::none(),
        py::arg("precision") = py::none(), py::arg("stream") = py::none(), help);
  };
  def_gemv(
      "gemv_gate", "ExpertStack.gemv_gate", Role::Gate, "x",
      "Gate rows of the experts `ids`: x [H], [T, H] or [T, k, H] and ids int32 [k] or [T, k]\n"
      "give f32 [k, I] or [T, k, I]; an id of -1 writes zeros. Arrays lie on the stack's device;\n"
      "on a GPU the call joins `stream` as the forwards do and waits for its launches.\n\n"
      "Raises ShapeError (also without a gate), DTypeError, DeviceError, CaptureError while a "
      "graph\n"
      "is recorded.");
  def_gemv("gemv_up", "ExpertStack.gemv_up", Role::Up, "x", "As gemv_gate, of the up rows.");
  def_gemv("gemv_down", "ExpertStack.gemv_down", Role::Down, "h",
           "Down rows, one input row per slot: h [k, I] or [T, k, I] gives f32 [k, H] or\n"
           "[T, k, H].");
  type.def("gemv_gate_up_silu", &gemv_gate_up_silu, py::arg("x"), py::arg("ids"), py::kw_only(),
           py::arg("out") = py::none(), py::arg("precision") = py::none(),
           py::arg("stream") = py::none(), "silu(gate x) * up x per slot; shapes as gemv_gate.");
  def_gemm("gemm_gate", "ExpertStack.gemm_gate", Role::Gate, "x",
           "Gate rows over a BucketPlan: x [T, H] gives f32 [P, I] in pair order; on a GPU as\n"
           "gemv_gate, with a copy of the plan.");
  def_gemm("gemm_up", "ExpertStack.gemm_up", Role::Up, "x", "As gemm_gate, of the up rows.");
  def_gemm("gemm_down", "ExpertStack.gemm_down", Role::Down, "h",
           "Down rows over a BucketPlan: h [P, I] in pair order gives f32 [P, H] in pair order.");
}

}  // namespace

void bind_expert_stack(py::module_& m) {
  py::class_<ExpertStack, Stack> type(
      m, "ExpertStack", py::is_final(),
      "The expert weights of one layer: gate, up and down, each kept in its own type.");
  type.def_static(
          "from_dense_stacks", &from_dense_stacks, py::arg("gate"), py::arg("up"), py::arg("down"),
          py::kw_only(), py::arg("device") = "cpu", py::arg("layout") = "auto",
          "Copy gate [E, I, H] (None for ungated experts), up [E, I, H] and down [E, H, I],\n"
          "each f32, f16 or bf16. Raises ShapeError, DTypeError naming the argument.")
      .def_static(
          "from_encoded", &from_encoded, py::arg("gate"), py::arg("up"), py::arg("down"),
          py::kw_only(), py::arg("device") = "cpu", py::arg("layout") = "auto",
          "From encoded bytes: each role is (bytes, type name, (E, rows, cols)) as\n"
          "testing.quantize makes them, gate None for ungated experts. layout 'file' keeps\n"
          "the arrays where they are. Raises ShapeError, ConfigError, UnsupportedError.")
      .def_static(
          "load_from_gguf", &load_from_gguf, py::arg("file").none(false), py::arg("layer"),
          py::arg("dequantize") = py::none(), py::kw_only(), py::arg("device") = "cpu",
          py::arg("layout") = "auto", py::arg("progress") = py::none(),
          "Load one layer. layout 'file' keeps the stored bytes without a copy, 'auto' takes\n"
          "what the backend runs fastest. dequantize='f32' (f16, bf16) asks for the dense\n"
          "form. progress(Progress) may return False to stop.\n\n"
          "Raises FormatError (missing or inconsistent tensors), UnsupportedError,\n"
          "OperationCancelled, OutOfMemoryError.")
      .def_static("open_and_load", &open_and_load, py::arg("path"), py::arg("layer"),
                  py::arg("dequantize") = py::none(), py::kw_only(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("progress") = py::none(),
                  "GgufFile and load_from_gguf in one.")
      .def_static(
          "from_marlin", &from_marlin, py::arg("gate_up").none(false), py::arg("down").none(false),
          py::kw_only(), py::arg("device") = "cpu",
          "INT4 experts: gate_up has k = H and n_per_expert = 2I, columns [gate | up]; down\n"
          "has k = I and n_per_expert = H. Shares their memory. Raises ShapeError.")
      .def("marlin", &marlin_of, py::arg("role"),
           "The MarlinExpertStack of 'gate_up' (or gate, up) or 'down'; None for other kinds.")
      .def_property_readonly("num_experts", &ExpertStack::num_experts, "E.")
      .def_property_readonly(
          "hidden_size", [](const ExpertStack& s) { return s.shape().hidden_size; }, "H.")
      .def_property_readonly(
          "intermediate_size", [](const ExpertStack& s) { return s.shape().intermediate_size; },
          "I.")
      .def_property_readonly("kind", &ExpertStack::kind, "stacked | per_expert | marlin.")
      .def_property_readonly("gated", &ExpertStack::gated, "Whether there is a gate.")
      .def_property_readonly(
          "quants",
          [](const ExpertStack& s) {
            py::dict types;
            for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
              if (s.role(role).ref)
                types[name_of(role)] = std::string(traits(s.role(role).ref.type).name);
            }
            return types;
          },
          "Type in memory, by role.")
      .def_property_readonly("nbytes", &ExpertStack::nbytes, "Bytes of all roles in memory.")
      .def_property_readonly("bytes_per_expert", &ExpertStack::bytes_per_expert,
                             "Bytes that one token reads per expert.")
      .def_property_readonly("report", &ExpertStack::report, "LoadReport.")
      .def("dequantize", &dequantize, py::arg("role"), py::arg("expert"),
           "One expert's gate [I, H], up [I, H] or down [H, I] as f32.")
      .def("__repr__", [](const ExpertStack& s) {
        std::string types;
        for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
          if (s.role(role).ref)
            types += (types.empty() ? "" : "/") + std::string(traits(s.role(role).ref.type).name);
        }
        return "moesaic.ExpertStack(num_experts=" + std::to_string(s.num_experts()) +
               ", hidden_size=" + std::to_string(s.shape().hidden_size) +
               ", intermediate_size=" + std::to_string(s.shape().intermediate_size) + ", " + types +
               ", " + std::to_string(s.nbytes()) + " bytes)";
      });
  define_products(type);
}

}  // namespace moesaic::python
