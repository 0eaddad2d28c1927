/// QuantMatrix: how it is made, its product, and what it says of itself.

#include "moesaic/quant_matrix.hpp"

#include <pybind11/stl.h>

#include <array>
#include <limits>

#include "arrays.hpp"
#include "calls.hpp"
#include "dtypes.hpp"
#include "gguf.hpp"
#include "gil.hpp"
#include "load.hpp"
#include "logging.hpp"
#include "pickling.hpp"
#include "quant.hpp"
#include "result.hpp"
#include "stack_parts.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

using Matrix = std::shared_ptr<QuantMatrix>;

/// The values of a bias [rows]; empty for None.
std::vector<float> import_bias(const py::object& bias, std::int64_t rows, const char* operation) {
  if (bias.is_none()) return {};
  return values_of_shape(bias, {rows}, "bias", operation);
}

Matrix share_matrix(QuantMatrix matrix) { return std::make_shared<QuantMatrix>(std::move(matrix)); }

Matrix matrix_from_dense(const py::object& values, const std::optional<std::string>& quant,
                         const py::object& weights, const py::object& bias,
                         const std::string& device, const std::string& layout,
                         const py::object& progress) {
  constexpr const char* kOperation = "QuantMatrix.from_dense";
  std::optional<QuantType> type;
  if (quant) type = parse_quant_type(*quant, kOperation);
  const ArrayRef in = import_array(values, kOperation, "values");
  ArrayRef importance;
  if (!weights.is_none()) importance = import_f32(weights, kOperation, "weights");
  const ConstTensorView view = in.read();
  // The library refuses another rank, and names it.
  std::vector<float> offsets;
  if (view.rank == 2) offsets = import_bias(bias, view.dim(0), kOperation);
  Loading loading(kOperation, device, layout, std::nullopt, progress);
  return loading.run([&](const LoadOptions& options) {
    return share_matrix(
        QuantMatrix::from_dense(view, type, importance.read(), options, std::move(offsets)));
  });
}

/// (N, K) of encoded rows: what was given, or what an array [N, row bytes] holds.
std::array<std::int64_t, 2> matrix_shape(const ConstTensorView& data, const QuantTraits& facts,
                                         const std::optional<std::array<std::int64_t, 2>>& given,
                                         const char* operation) {
  if (given) return *given;
  const auto bytes =
      data.rank == 2 ? data.dim(1) * static_cast<std::int64_t>(size_of(data.dtype)) : 0;
  require<ShapeError>(data.rank == 2 && bytes % facts.block_bytes == 0, [&] {
    return Problem{operation, "data",
                   "[N, row bytes], with rows of whole blocks of " +
                       std::to_string(facts.block_bytes) + " bytes",
                   describe(data), "or give the shape (N, K)"};
  });
  return {data.dim(0), bytes / facts.block_bytes * facts.block_elems};
}

Matrix matrix_from_encoded(const py::object& data, const std::string& quant,
                           const std::optional<std::array<std::int64_t, 2>>& shape, float scale,
                           const py::object& bias, const std::string& device,
                           const std::string& layout) {
  constexpr const char* kOperation = "QuantMatrix.from_encoded";
  const QuantType type = parse_quant_type(quant, kOperation);
  const ArrayRef in = import_array(data, kOperation, "data");
  const ConstTensorView view = in.read();
  require<ShapeError>(is_dense(view), [&] {
    return Problem{kOperation, "data", "dense bytes", describe(view), {}};
  });
  const auto [rows, cols] = matrix_shape(view, traits(type), shape, kOperation);
  const QuantMatrix::Encoded encoded{
      type,
      rows,
      cols,
      static_cast<const std::byte*>(view.data),
      static_cast<std::size_t>(view.num_elements()) * size_of(view.dtype),
      share_object(in.keep),
      scale};
  std::vector<float> offsets = import_bias(bias, rows, kOperation);
  Loading loading(kOperation, device, layout, std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return share_matrix(QuantMatrix::from_encoded(encoded, options, std::move(offsets)));
  });
}

Matrix matrix_from_gguf(const py::object& source, const Text& name,
                        const std::optional<std::string>& dequantize,
                        const std::optional<Text>& bias, const std::string& device,
                        const std::string& layout, const py::object& weight_cache,
                        const py::object& progress) {
  constexpr const char* kOperation = "QuantMatrix.from_gguf";
  const auto file = gguf_file(source, kOperation);
  Loading loading(kOperation, device, layout, dequantize, progress);
  const py::object cache = loading.keep_panels(weight_cache, *file, kOperation);
  const Matrix matrix = loading.run([&](const LoadOptions& options) {
    return share_matrix(
        QuantMatrix::from_gguf(file, name.bytes, bias ? bias->bytes : std::string(), options));
  });
  if (log_enabled(kLogInfo)) {
    log(kLogInfo, std::string(kOperation) + ": " + name.bytes + ": " +
                      std::string(traits(matrix->type()).name) + " in " +
                      name_of(matrix->weights().ref.layout) + ", " +
                      std::to_string(matrix->nbytes()) + " bytes");
  }
  const py::dict options(py::arg("dequantize") = dequantize, py::arg("bias") = bias,
                         py::arg("device") = device, py::arg("layout") = layout,
                         py::arg("weight_cache") = cache);
  remember_origin(matrix, reduced("gguf_matrix", source_of(file), name, options));
  return matrix;
}

/// An array [..., width] as rows; one of a single dimension is one row.
TensorView matrix_rows(const TensorView& array, const TensorView& merged) {
  if (array.rank != 1) return merged;
  return {array.data, array.dtype, {1, array.dim(0)}, array.device};
}

py::object call_matrix(const QuantMatrix& matrix, const py::object& x, const py::object& out,
                       Workspace* workspace, bool accumulate,
                       const std::optional<std::string>& precision) {
  constexpr const char* kOperation = "QuantMatrix";
  ArrayRef in = import_rows(x, kOperation, "x");
  const int rank = in.view.rank;
  require<ShapeError>(rank >= 1 && in.view.dim(rank - 1) == matrix.cols(), [&] {
    return Problem{
        kOperation, "x", "[..., " + std::to_string(matrix.cols()) + "]", describe(in.view), {}};
  });
  require<ConfigError>(!accumulate || !out.is_none(), [&] {
    return Problem{kOperation, "accumulate", "an out= to add to", "none", {}};
  });
  const TensorView merged = rank > 1 ? merged_in(in, rank - 1, kOperation, "x") : in.view;
  const TensorView rows = matrix_rows(in.view, merged);
  std::vector<std::int64_t> shape(in.view.shape.begin(), in.view.shape.begin() + rank);
  shape.back() = matrix.rows();
  Call call(parse_precision(precision, kOperation), matrix.device());
  Result result(x, in, in.view.dtype, shape, out, kOperation, true);
  const TensorView y = matrix_rows(result.view(), merged_out(result.view(), rank - 1, kOperation));
  {
    const InterruptibleRelease release;
    const CallWorkspace scratch(workspace, call.context,
                                [&] { return workspace_bytes(call.context, matrix, rows.dim(0)); });
    multiply(call.context, matrix, rows, y, *scratch, Precision::Auto, accumulate);
  }
  return result.finish();
}

py::object bias_of(const QuantMatrix& matrix) {
  const auto& bias = matrix.weights().bias;
  if (bias == nullptr) return py::none();
  return numpy_view(DType::F32, {matrix.rows()}, bias->data(), bias);
}

float scale_of(const QuantMatrix& matrix) {
  const auto& scale = matrix.weights().scale;
  return scale == nullptr ? 1.0F : scale->front();
}

std::string quant_name(const QuantMatrix& matrix) {
  return std::string(traits(matrix.type()).name);
}

std::string matrix_repr(const QuantMatrix& matrix) {
  return "moesaic.QuantMatrix(" + shape_text({matrix.rows(), matrix.cols()}) + ", " +
         quant_name(matrix) + ", " + std::to_string(matrix.nbytes()) + " bytes" +
         (matrix.weights().bias == nullptr ? ")" : ", with a bias)");
}

}  // namespace

void bind_quant_matrix(py::module_& m) {
  py::class_<QuantMatrix, Matrix> type(m, "QuantMatrix", py::is_final());
  reduce_by(type, [](py::handle self) { return origin_of(self.cast<Matrix>(), "QuantMatrix"); });
  type.def_static("from_dense", &matrix_from_dense, py::arg("values"),
                  py::arg("quant") = py::none(), py::arg("weights") = py::none(), py::kw_only(),
                  py::arg("bias") = py::none(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("progress") = py::none())
      .def_static("from_encoded", &matrix_from_encoded, py::arg("data"), py::arg("quant"),
                  py::arg("shape") = py::none(), py::kw_only(), py::arg("scale") = 1.0F,
                  py::arg("bias") = py::none(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto")
      .def_static("from_gguf", &matrix_from_gguf, py::arg("file"), py::arg("name"),
                  py::arg("dequantize") = py::none(), py::kw_only(), py::arg("bias") = py::none(),
                  py::arg("device") = "cpu", py::arg("layout") = "auto",
                  py::arg("weight_cache") = false, py::arg("progress") = py::none())
      .def("__call__", &call_matrix, py::arg("x"), py::kw_only(), py::arg("out") = py::none(),
           py::arg("workspace") = py::none(), py::arg("accumulate") = false,
           py::arg("precision") = py::none())
      .def_property_readonly(
          "shape", [](const QuantMatrix& w) { return py::make_tuple(w.rows(), w.cols()); })
      .def_property_readonly("quant", &quant_name)
      .def_property_readonly("nbytes", &QuantMatrix::nbytes)
      .def_property_readonly("layout",
                             [](const QuantMatrix& w) { return name_of(w.weights().ref.layout); })
      .def_property_readonly("device", [](const QuantMatrix& w) { return to_string(w.device()); })
      .def_property_readonly("bias", &bias_of)
      .def_property_readonly("scale", &scale_of)
      .def("dequantize",
           [](const QuantMatrix& w) {
             return decoded_matrix(w.weights(), "QuantMatrix.dequantize");
           })
      .def("encoded", [](const QuantMatrix& w) { return encoded_matrix(w.weights()); })
      .def("__copy__", [](const Matrix& self) { return self; })
      .def(
          "__deepcopy__", [](const Matrix& self, const py::object&) { return self; },
          py::arg("memo"), py::pos_only())
      .def("__repr__", &matrix_repr);
}

}  // namespace moesaic::python
