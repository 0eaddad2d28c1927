#include "quant.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "arrays.hpp"
#include "calls.hpp"
#include "dtypes.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "moesaic/quantize.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::python {
namespace {

py::array quantize(const py::object& values, const std::string& quant, const py::object& weights) {
  constexpr const char* kOperation = "quantize";
  const QuantType type = parse_quant_type(quant, kOperation);
  const ArrayRef in = import_rows(values, kOperation, "values");
  require<ShapeError>(in.view.rank >= 1, [&] {
    return Problem{kOperation, "values", "1 to 4 dimensions", describe(in.view), {}};
  });
  ArrayRef importance;
  if (!weights.is_none()) importance = import_f32(weights, kOperation, "weights");
  std::vector<py::ssize_t> shape(in.view.shape.begin(), in.view.shape.begin() + in.view.rank);
  shape.back() = row_bytes(type, shape.back());
  py::array_t<std::uint8_t> out(shape);
  auto* const to = reinterpret_cast<std::byte*>(out.mutable_data());
  const auto pool = shared_pool(current_tuning());
  const InterruptibleRelease release;
  quantize_rows(type, in.read(), importance.read(), to, *pool);
  return out;
}

/// The shape in elements of bytes [..., row bytes].
std::vector<std::int64_t> shape_of_rows(const QuantTraits& facts, const ConstTensorView& data,
                                        const char* operation) {
  require<ShapeError>(data.rank >= 1, [&] {
    return Problem{operation, "data", "[..., row bytes]", describe(data), {}};
  });
  std::vector<std::int64_t> shape(data.shape.begin(), data.shape.begin() + data.rank);
  const std::int64_t bytes = shape.back() * static_cast<std::int64_t>(size_of(data.dtype));
  require<ShapeError>(bytes % facts.block_bytes == 0, [&] {
    return Problem{operation,
                   "data",
                   "rows of whole blocks of " + std::to_string(facts.block_bytes) + " bytes of " +
                       std::string(facts.name),
                   std::to_string(bytes) + " bytes per row",
                   {}};
  });
  shape.back() = bytes / facts.block_bytes * facts.block_elems;
  return shape;
}

py::array dequantize(const py::object& data, const std::string& quant,
                     const std::optional<std::vector<std::int64_t>>& wanted) {
  constexpr const char* kOperation = "dequantize";
  const QuantType type = parse_quant_type(quant, kOperation);
  const ArrayRef in = import_array(data, kOperation, "data");
  require<ShapeError>(is_dense(in.view) && (!wanted || !wanted->empty()), [&] {
    return Problem{kOperation, "data", "dense bytes", describe(in.view), {}};
  });
  const std::vector<std::int64_t> shape =
      wanted ? *wanted : shape_of_rows(traits(type), in.read(), kOperation);
  std::int64_t rows = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    constexpr std::int64_t kMaxRows = std::int64_t{1} << 31, kMaxCols = std::int64_t{1} << 28;
    const bool last = i + 1 == shape.size();
    if (shape[i] >= 0 && !last) rows *= std::min(shape[i], kMaxRows + 1);
    require<ShapeError>(shape[i] >= 0 && rows <= kMaxRows && (!last || shape[i] <= kMaxCols), [&] {
      return Problem{
          kOperation, "shape", "sizes from 0 to 2^31 rows of 2^28", std::to_string(shape[i]), {}};
    });
  }
  const std::int64_t cols = shape.back();
  const std::int64_t bytes = rows * row_bytes(type, cols);
  const auto given = in.view.num_elements() * static_cast<std::int64_t>(size_of(in.view.dtype));
  require<ShapeError>(given == bytes, [&] {
    return Problem{
        kOperation, "data", std::to_string(bytes) + " bytes", std::to_string(given) + " bytes", {}};
  });
  py::array_t<float> out(std::vector<py::ssize_t>(shape.begin(), shape.end()));
  float* const to = out.mutable_data();
  const auto pool = shared_pool(current_tuning());
  const InterruptibleRelease release;
  dequantize_rows(type, static_cast<const std::byte*>(in.view.data), rows, cols, to, *pool);
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
    facts["takes_weights"] = takes_importance(traits.type);
    facts["gguf"] = is_ggml_type(traits.type);
    types[py::str(traits.name)] = facts;
  }
  return types;
}

}  // namespace

QuantType parse_quant_type(const std::string& name, const char* operation, const char* what) {
  const auto type = quant_type_from_name(name);
  require<ConfigError>(type.has_value(), [&] {
    return Problem{operation, what, "a type name such as Q4_K", "'" + name + "'", quant_hint(name)};
  });
  return *type;
}

void bind_quant(py::module_& m) {
  m.def("quantize", &quantize, py::arg("values"), py::arg("quant"), py::kw_only(),
        py::arg("weights") = py::none());
  m.def("dequantize", &dequantize, py::arg("data"), py::arg("quant"),
        py::arg("shape") = py::none());
  m.def("quant_types", &quant_types);
}

}  // namespace moesaic::python
