#include <pybind11/stl.h>

#include <cstring>

#include "arrays.hpp"
#include "calls.hpp"
#include "devices.hpp"
#include "int4/marlin_layout.hpp"
#include "int4/p4_layout.hpp"
#include "load.hpp"
#include "moesaic/marlin_stack.hpp"
#include "moesaic/thread_pool.hpp"
#include "ops/call_memory.hpp"

namespace moesaic::python {
namespace {

using Stack = std::shared_ptr<MarlinExpertStack>;
using Builder = MarlinExpertStack::Builder;

/// Tensors of the caller, and what keeps them alive.
struct TensorRefs {
  ArrayRef qweight, scales, qzeros, g_idx;
  GptqTensors tensors;

  TensorRefs(const char* operation, const py::object& qweight_array, const py::object& scales_array,
             const py::object& qzeros_array, const py::object& g_idx_array)
      : qweight(import_array(qweight_array, operation, "qweight")),
        scales(import_array(scales_array, operation, "scales")) {
    if (!qzeros_array.is_none()) qzeros = import_array(qzeros_array, operation, "qzeros");
    if (!g_idx_array.is_none()) g_idx = import_array(g_idx_array, operation, "g_idx");
    tensors.qweight = qweight.read();
    tensors.scales = scales.read();
    tensors.qzeros = qzeros.read();
    tensors.g_idx = g_idx.read();
  }
};

std::shared_ptr<ThreadPool> current_pool() {
  return ThreadPool::shared(current_tuning().threads.value_or(0));
}

Stack from_gptq(const py::object& qweight, const py::object& scales, const py::object& qzeros,
                const py::object& g_idx, std::int64_t group_size, const std::string& format) {
  constexpr const char* kOperation = "MarlinExpertStack.from_gptq";
  TensorRefs refs(kOperation, qweight, scales, qzeros, g_idx);
  refs.tensors.group_size = group_size;
  refs.tensors.format = parse_name<CheckpointFormat>(format, kOperation, "checkpoint_format");
  const auto pool = current_pool();
  const py::gil_scoped_release release;
  return std::make_shared<MarlinExpertStack>(
      MarlinExpertStack::from_gptq(refs.tensors, pool.get()));
}

std::unique_ptr<Builder> make_builder(std::int32_t num_experts, std::int64_t k,
                                      std::int64_t n_per_expert, std::int64_t group_size,
                                      const std::string& format, bool f32_scales, bool zeros,
                                      const py::object& g_idx) {
  constexpr const char* kOperation = "MarlinStackBuilder";
  ArrayRef order;
  if (!g_idx.is_none()) order = import_array(g_idx, kOperation, "g_idx");
  const MarlinExpertStack::Spec spec{
      .num_experts = num_experts,
      .k = k,
      .n_per_expert = n_per_expert,
      .group_size = group_size,
      .format = parse_name<CheckpointFormat>(format, kOperation, "format"),
      .scale_dtype = f32_scales ? DType::F32 : DType::F16,
      .zeros = zeros,
      .g_idx = order.read()};
  return std::make_unique<Builder>(spec);
}

void add_part(Builder& builder, std::int32_t expert, std::int64_t first_col,
              const py::object& qweight, const py::object& scales, const py::object& qzeros,
              const std::string& name) {
  const TensorRefs refs("MarlinStackBuilder.add", qweight, scales, qzeros, py::none());
  const auto pool = current_pool();
  const py::gil_scoped_release release;
  builder.add(expert, first_col, refs.tensors, name, pool.get());
}

template <class T>
py::array copy_array(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  py::array_t<T> out(std::move(shape));
  if (!values.empty()) std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(T));
  return out;
}

py::object order_or_none(const std::vector<std::int32_t>& values) {
  if (values.empty()) return py::none();
  return copy_array(values, {static_cast<py::ssize_t>(values.size())});
}

py::dict unpack(const MarlinExpertStack& stack, std::int32_t expert) {
  const Int4Matrix m = stack.unpack(expert);
  py::dict out;
  out["codes"] = copy_array(m.codes, {m.k, m.n});
  out["scales"] = copy_array(m.scales, {m.groups, m.n});
  out["zeros"] = copy_array(m.zeros, {m.groups, m.n});
  out["g_idx"] = order_or_none(m.g_idx);
  return out;
}

py::dict repack(const MarlinExpertStack& stack, const std::string& layout, std::int32_t expert,
                bool interleave_gate_up) {
  py::dict out;
  if (layout == "marlin") {
    const int4::MarlinMatrix m = int4::to_marlin(stack.unpack(expert));
    out["qweight"] = copy_array(m.qweight, {m.k / 16, 2 * m.n});
    out["scales"] = copy_array(m.scales, {m.groups, m.n});
    out["qzeros"] = m.qzeros.empty() ? py::object(py::none())
                                     : py::object(copy_array(m.qzeros, {m.groups, m.n / 8}));
    out["perm"] = order_or_none(m.perm);
    return out;
  }
  require<ConfigError>(layout == "p4", [&] {
    return Problem{"MarlinExpertStack.repack", "layout", "marlin | p4", "'" + layout + "'", {}};
  });
  const int4::P4Matrix m = int4::to_p4(stack.unpack(expert), interleave_gate_up);
  const auto bytes = [](const std::vector<std::uint8_t>& values) {
    return copy_array(values, {static_cast<py::ssize_t>(values.size())});
  };
  out["bytes"] = bytes(m.bytes);
  out["side_scales"] = bytes(m.side_scales);
  out["side_zeros"] = bytes(m.side_zeros);
  out["row_block_bytes"] = m.row_block_bytes;
  out["packed_rows"] = m.packed_rows;
  out["packed_cols"] = m.packed_cols;
  out["perm"] = order_or_none(m.perm);
  return out;
}

py::array dequantize(const MarlinExpertStack& stack, std::int32_t expert) {
  const WeightRef& weight = stack.weights().ref;
  require<ShapeError>(expert >= 0 && expert < stack.num_experts(), [&] {
    return Problem{"MarlinExpertStack.dequantize",
                   "expert",
                   "0 to " + std::to_string(stack.num_experts() - 1),
                   std::to_string(expert),
                   {}};
  });
  py::array_t<float> out({weight.rows, weight.cols});
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    dequantize_expert_row(weight, expert, row, to + row * weight.cols);
  }
  return out;
}

/// How to run a product, as Python gave it.
struct ProductArguments {
  const char* operation;
  const py::object& x;
  const py::object& out;
  const std::optional<std::string>& precision;
  Place place;
};

/// The one body of the products: run(context, x, out).
template <class Run>
py::object product(const ProductArguments& arguments, const ArrayRef& in, std::int64_t rows,
                   std::int64_t cols, Run&& run) {
  const auto& [operation, x, out, precision, place] = arguments;
  Result result(x, in, DType::F32, {rows, cols}, out, operation, false, place);
  const TensorView view = result.view();
  require_disjoint(view, in.read(), operation, "x");
  Call call(parse_precision(precision, operation), place.device);
  call.context.set_stream(place.stream);
  {
    const py::gil_scoped_release release;
    run(call.context, in.read(), view);
  }
  return result.finish();
}

using DispatchTuple = std::tuple<std::int32_t, std::int64_t, std::int64_t, std::int64_t>;

Stack to_device(const MarlinExpertStack& stack, const std::string& device) {
  Loading loading("MarlinExpertStack.to", device, "auto", std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<MarlinExpertStack>(stack.to(options));
  });
}

std::vector<MarlinDispatch> dispatch_list(const std::vector<DispatchTuple>& dispatches,
                                          const char* operation) {
  std::vector<MarlinDispatch> list;
  for (const auto& [expert, in_row, out_row, count] : dispatches) {
    require<ShapeError>(in_row >= 0 && out_row >= 0 && count >= 0 && in_row <= INT32_MAX &&
                            out_row <= INT32_MAX && count <= INT32_MAX,
                        [&] {
                          return Problem{
                              operation,
                              "dispatches",
                              "(expert, in_row, out_row, rows), none negative",
                              "(" + std::to_string(expert) + ", " + std::to_string(in_row) + ", " +
                                  std::to_string(out_row) + ", " + std::to_string(count) + ")",
                              {}};
                        });
    list.push_back({expert, in_row, out_row, count});
  }
  return list;
}

/// Rows of a new output: up to the last that a dispatch names.
std::int64_t rows_named(const std::vector<MarlinDispatch>& list, std::int64_t in_rows,
                        const char* operation) {
  std::int64_t rows = 0, named = 0;
  for (const MarlinDispatch& d : list) {
    rows = std::max(rows, d.out_row + d.rows);
    named += d.rows;
  }
  // More than x has is a mistake.
  require<ShapeError>(rows <= named + in_rows, [&] {
    return Problem{operation,
                   "dispatches",
                   "output rows next to each other, or an out=",
                   "row " + std::to_string(rows - 1) + " of " + std::to_string(named),
                   {}};
  });
  return rows;
}

py::object phase_batched(const MarlinExpertStack& stack, const py::object& x,
                         const std::vector<DispatchTuple>& dispatches, const py::object& out,
                         const std::optional<std::string>& precision, const py::object& stream) {
  constexpr const char* kOperation = "MarlinExpertStack.gemm_phase_batched";
  const Place place = call_place(stack.device(), stream, x, kOperation);
  const ArrayRef in = import_array(x, kOperation, "x_packed", place);
  const std::vector<MarlinDispatch> list = dispatch_list(dispatches, kOperation);
  const bool fresh = out.is_none();
  std::int64_t rows = 0;
  if (fresh) {
    rows = rows_named(list, in.view.rank == 2 ? in.view.dim(0) : 0, kOperation);
  } else {
    const ArrayRef given = import_array(out, kOperation, "out", place);
    if (given.view.rank == 2) rows = given.view.dim(0);
  }
  return product({kOperation, x, out, precision, place}, in, rows, stack.n_per_expert(),
                 [&](Context& context, const ConstTensorView& from, const TensorView& to) {
                   if (fresh && !to.empty()) {
                     forward::require_no_capture(kOperation, context, "dispatches");
                     const auto bytes = static_cast<std::size_t>(to.num_elements()) * sizeof(float);
                     context.backend().fill(context, to.data, 0, bytes);
                   }
                   stack.gemm_phase_batched(context, from, list, to);
                 });
}

py::object phase_vllm(const MarlinExpertStack& stack, const py::object& x,
                      const std::shared_ptr<AlignedRouting>& aligned, std::int32_t top_k,
                      const py::object& out, const std::optional<std::string>& precision,
                      const py::object& stream) {
  constexpr const char* kOperation = "MarlinExpertStack.gemm_phase_vllm";
  const Place place = call_place(stack.device(), stream, x, kOperation);
  const ArrayRef in = import_array(x, kOperation, "x", place);
  return product({kOperation, x, out, precision, place}, in, aligned->num_pairs(),
                 stack.n_per_expert(),
                 [&](Context& context, const ConstTensorView& from, const TensorView& to) {
                   stack.gemm_phase_vllm(context, from, *aligned, top_k, to);
                 });
}

MarlinLinear make_expert_linear(const MarlinExpertStack& stack, std::int32_t expert,
                                std::int64_t first_col, const std::optional<std::int64_t>& cols,
                                const py::object& bias) {
  std::vector<float> values;
  if (!bias.is_none()) values = import_floats(bias, "make_expert_linear", "bias");
  require<ShapeError>(!cols || *cols >= 1, [&] {
    return Problem{"make_expert_linear", "cols", "at least 1, or None", std::to_string(*cols), {}};
  });
  require<ShapeError>(bias.is_none() || !values.empty(), [&] {
    return Problem{"make_expert_linear", "bias", "one value per column", "none", {}};
  });
  return stack.make_expert_linear(expert, first_col, cols.value_or(-1), std::move(values));
}

py::object call_linear(const MarlinLinear& linear, const py::object& x, const py::object& out,
                       const std::optional<std::string>& precision, const py::object& stream) {
  constexpr const char* kOperation = "MarlinLinear";
  const Place place = call_place(linear.device(), stream, x, kOperation);
  const ArrayRef in = import_array(x, kOperation, "x", place);
  const std::int64_t rows = in.view.rank == 2 ? in.view.dim(0) : 0;
  return product({kOperation, x, out, precision, place}, in, rows, linear.out_features(),
                 [&](Context& context, const ConstTensorView& from, const TensorView& to) {
                   linear.forward(context, from, to);
                 });
}

std::string repr(const MarlinExpertStack& m) {
  return "moesaic.MarlinExpertStack(num_experts=" + std::to_string(m.num_experts()) +
         ", k=" + std::to_string(m.k()) + ", n_per_expert=" + std::to_string(m.n_per_expert()) +
         ", group_size=" + std::to_string(m.group_size()) +
         (m.symmetric() ? ", symmetric" : ", zero points") + (m.act_order() ? ", act_order" : "") +
         (m.device() == Device{} ? "" : ", " + to_string(m.device())) + ", " +
         std::to_string(m.nbytes()) + " bytes)";
}

}  // namespace

void bind_marlin(py::module_& m) {
  py::class_<MarlinLinear>(m, "MarlinLinear", py::is_final(),
                           "Columns of one expert as a layer: lin(x) is x @ W.T (+ bias).")
      .def_property_readonly("in_features", &MarlinLinear::in_features, "K.")
      .def_property_readonly("out_features", &MarlinLinear::out_features, "Columns.")
      .def("__call__", &call_linear, py::arg("x"), py::kw_only(), py::arg("out") = py::none(),
           py::arg("precision") = py::none(), py::arg("stream") = py::none(),
           "x [m, in_features] gives f32 [m, out_features], on the device of the stack, as\n"
           "MarlinExpertStack.gemm_phase_batched. Raises ShapeError, DTypeError, DeviceError.")
      .def("__repr__", [](const MarlinLinear& l) {
        return "moesaic.MarlinLinear(in_features=" + std::to_string(l.in_features()) +
               ", out_features=" + std::to_string(l.out_features()) + ")";
      });

  py::class_<MarlinExpertStack, Stack>(
      m, "MarlinExpertStack", py::is_final(),
      "INT4 group weights [K, n_per_expert] of all experts, from GPTQ or AWQ tensors.")
      .def_static(
          "from_gptq", &from_gptq, py::arg("qweight"), py::arg("scales"),
          py::arg("qzeros") = py::none(), py::arg("g_idx") = py::none(),
          py::arg("group_size") = 128, py::arg("checkpoint_format") = "gptq",
          "qweight int32 [E, K/8, N], scales f16, bf16 or f32 [E, groups, N], qzeros int32\n"
          "[E, groups, N/8] (None: every zero point is 8), g_idx int32 [K] or [E, K] (None:\n"
          "k / group_size). group_size -1 means per channel. checkpoint_format is gptq (zero\n"
          "points stored one too small), gptq_v2, awq (qweight [E, K, N/8]), or pack_quantized\n"
          "(qweight [E, N, K/8], scales [E, N, groups], qzeros [E, N/8, groups]).\n\n"
          "Raises ShapeError, DTypeError naming the tensor, FormatError (a g_idx outside the\n"
          "groups).")
      .def_property_readonly("num_experts", &MarlinExpertStack::num_experts, "E.")
      .def_property_readonly("k", &MarlinExpertStack::k, "Input features.")
      .def_property_readonly("n_per_expert", &MarlinExpertStack::n_per_expert,
                             "Output features of an expert.")
      .def_property_readonly("group_size", &MarlinExpertStack::group_size,
                             "Columns of a group; k when per channel.")
      .def_property_readonly("symmetric", &MarlinExpertStack::symmetric,
                             "Whether every zero point is 8.")
      .def_property_readonly("act_order", &MarlinExpertStack::act_order,
                             "Whether there is a g_idx.")
      .def_property_readonly("nbytes", &MarlinExpertStack::nbytes, "Bytes on the device.")
      .def_property_readonly(
          "device", [](const MarlinExpertStack& s) { return to_string(s.device()); },
          "Where the products run: cpu | cuda:0 ...")
      .def("to", &to_device, py::arg("device"),
           "The stack for products on `device`: a repacked copy there, beside the host's memory,\n"
           "which both stacks share and unpack, repack, dequantize and ExpertStack.from_marlin\n"
           "read. Linears cut out of it lie on the device too.\n\n"
           "Raises DeviceError (an absent backend), UnsupportedError, OutOfMemoryError.")
      .def("zero_workspace", &MarlinExpertStack::zero_workspace,
           "Does nothing: no kernel here keeps locks, and outputs are written whole.")
      .def("unpack", &unpack, py::arg("expert"),
           "One expert as it was: codes uint8 [K, N], scales f32 and zeros uint8 [groups, N], "
           "g_idx\n"
           "int32 [K] or None.")
      .def("repack", &repack, py::arg("layout"), py::arg("expert"), py::kw_only(),
           py::arg("interleave_gate_up") = false,
           "One expert in a GPU layout: 'marlin' gives qweight [K/16, 2N], scales, qzeros and "
           "perm;\n"
           "'p4' gives bytes (cpp/src/int4/README.md). Raises UnsupportedError for sizes that "
           "the\n"
           "layout does not have.")
      .def("dequantize", &dequantize, py::arg("expert"), "One expert as f32 [n_per_expert, K].")
      .def(
          "gemm_phase_batched", &phase_batched, py::arg("x_packed"), py::arg("dispatches"),
          py::kw_only(), py::arg("out") = py::none(), py::arg("precision") = py::none(),
          py::arg("stream") = py::none(),
          "For each (expert, in_row, out_row, rows): out rows = x rows @ W[expert].T, f32\n"
          "[rows, n_per_expert]. Any number of rows. Rows of out= that no dispatch names are left\n"
          "alone; in a new array they are zero.\n\n"
          "Arrays lie on the stack's device. On a GPU the call joins `stream` as the forwards do,\n"
          "gets copies of the dispatches there, and waits for its launches.\n\n"
          "Raises ShapeError (rows outside, an expert out of range, an output row named twice),\n"
          "DeviceError, CaptureError while a graph is recorded.")
      .def("gemm_phase_vllm", &phase_vllm, py::arg("x"), py::arg("aligned").none(false),
           py::arg("top_k"), py::kw_only(), py::arg("out") = py::none(),
           py::arg("precision") = py::none(), py::arg("stream") = py::none(),
           "Over aligned blocks: sorted id v reads x row v // top_k and writes row v of f32\n"
           "[P, n_per_expert]; rows of skipped pairs are zero. On a GPU as gemm_phase_batched.\n\n"
           "Raises ShapeError unless x.shape[0] * top_k is P, and for packed rows with a top_k not "
           "1.")
      .def("make_expert_linear", &make_expert_linear, py::arg("expert"), py::arg("first_col") = 0,
           py::arg("cols") = py::none(), py::arg("bias") = py::none(),
           "Columns [first_col, first_col + cols) of one expert (None: to the end) as a "
           "MarlinLinear\n"
           "that shares memory (on a GPU it has its own). Both are multiples of 64, or reach the "
           "end. bias is [cols].\n\n"
           "Raises ShapeError.")
      .def("__repr__", &repr);

  py::class_<Builder>(m, "MarlinStackBuilder", py::is_final(),
                      "Packs experts one by one into one buffer; what load_from_safetensors uses.")
      .def(py::init(&make_builder), py::arg("num_experts"), py::arg("k"), py::arg("n_per_expert"),
           py::arg("group_size"), py::arg("format"), py::kw_only(), py::arg("f32_scales") = false,
           py::arg("zeros") = true, py::arg("g_idx") = py::none())
      .def("add", &add_part, py::arg("expert"), py::arg("first_col"), py::arg("qweight"),
           py::arg("scales"), py::arg("qzeros"), py::arg("name"),
           "Columns from first_col on, of tensors without the leading E.")
      .def(
          "build",
          [](Builder& builder) {
            return std::make_shared<MarlinExpertStack>(std::move(builder).build());
          },
          "The stack; call once. Raises ShapeError when columns are missing.");
}

}  // namespace moesaic::python
