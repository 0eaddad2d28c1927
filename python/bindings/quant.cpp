#include "moesaic/quant.hpp"

#include <pybind11/stl.h>

#include <algorithm>

#include "arrays.hpp"
#include "dtypes.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

QuantType parse_type(const std::string& name, const char* operation) {
  const auto type = quant_type_from_name(name);
  require<ConfigError>(type.has_value(), [&] {
    return Problem{operation, "type", "a ggml type name such as Q4_K", "'" + name + "'",
                   quant_hint(name)};
  });
  return *type;
}

py::array quantize(const py::object& values, const std::string& type_name) {
  constexpr const char* kOperation = "testing.quantize";
  const QuantType type = parse_type(type_name, kOperation);
  const ArrayRef in = import_array(values, kOperation, "w");
  require<DTypeError>(in.view.dtype == DType::F32,
                      [&] { return Problem{kOperation, "w", "f32", name_of(in.view.dtype), {}}; });
  require<ShapeError>(in.view.rank >= 1 && is_dense(in.view), [&] {
    return Problem{kOperation, "w", "a dense array of rank 1 to 4", describe(in.view), {}};
  });
  const std::int64_t cols = in.view.dim(in.view.rank - 1);
  const std::int64_t bytes = row_bytes(type, cols);
  const std::int64_t rows = cols == 0 ? 0 : in.view.num_elements() / cols;
  std::vector<py::ssize_t> shape(in.view.shape.begin(), in.view.shape.begin() + in.view.rank);
  shape.back() = bytes;
  py::array_t<std::uint8_t> out(shape);
  auto* to = reinterpret_cast<std::byte*>(out.mutable_data());
  const auto* from = static_cast<const float*>(in.view.data);
  const InterruptibleRelease release;
  for (std::int64_t row = 0; row < rows; ++row) {
    Interrupt::check();
    quantize_row(type, from + row * cols, to + row * bytes, cols);
  }
  return out;
}

py::array dequantize(const py::object& data, const std::string& type_name,
                     const std::vector<py::ssize_t>& shape) {
  constexpr const char* kOperation = "testing.dequantize";
  const QuantType type = parse_type(type_name, kOperation);
  const ArrayRef in = import_array(data, kOperation, "data");
  require<ShapeError>(is_dense(in.view) && !shape.empty(), [&] {
    return Problem{kOperation, "data", "dense bytes and a shape", describe(in.view), {}};
  });
  std::int64_t rows = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    constexpr std::int64_t kMaxRows = std::int64_t{1} << 31, kMaxCols = std::int64_t{1} << 28;
    const bool last = i + 1 == shape.size();
    if (shape[i] >= 0 && !last) rows *= std::min<std::int64_t>(shape[i], kMaxRows + 1);
    require<ShapeError>(shape[i] >= 0 && rows <= kMaxRows && (!last || shape[i] <= kMaxCols), [&] {
      return Problem{
          kOperation, "shape", "sizes from 0 to 2^31 rows of 2^28", std::to_string(shape[i]), {}};
    });
  }
  const std::int64_t cols = shape.back();
  const std::int64_t bytes = row_bytes(type, cols);
  const auto given = in.view.num_elements() * static_cast<std::int64_t>(size_of(in.view.dtype));
  require<ShapeError>(given == rows * bytes, [&] {
    return Problem{kOperation,
                   "data",
                   std::to_string(rows * bytes) + " bytes",
                   std::to_string(given) + " bytes",
                   {}};
  });
  py::array_t<float> out(shape);
  float* to = out.mutable_data();
  const auto* from = static_cast<const std::byte*>(in.view.data);
  const InterruptibleRelease release;
  for (std::int64_t row = 0; row < rows; ++row) {
    Interrupt::check();
    dequantize_row(type, from + row * bytes, to + row * cols, cols);
  }
  return out;
}

py::dict quant_types() {
  py::dict types;
  for (const QuantTraits& traits : quant_table()) {
    py::dict facts;
    facts["id"] = static_cast<int>(traits.type);
    facts["block_elems"] = traits.block_elems;
    facts["block_bytes"] = traits.block_bytes;
    facts["bits_per_weight"] = traits.bits_per_weight();
    facts["decodes"] = traits.dequantize != nullptr;
    facts["encodes"] = has_encoder(traits.type);
    types[py::str(traits.name)] = facts;
  }
  return types;
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def("quantize", &quantize, py::arg("values"), py::arg("type"));
  m.def("dequantize", &dequantize, py::arg("data"), py::arg("type"), py::arg("shape"));
  m.def("quant_types", &quant_types);
}

}  // namespace moesaic::python
