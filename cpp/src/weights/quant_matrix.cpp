#include "moesaic/quant_matrix.hpp"

#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "base/nearest.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/quantize.hpp"
#include "moesaic/thread_pool.hpp"
#include "weights/gguf_roles.hpp"
#include "weights/reencode.hpp"
#include "weights/role_sources.hpp"

namespace moesaic {
namespace {

constexpr const char* kFromDense = "QuantMatrix.from_dense";
constexpr const char* kFromEncoded = "QuantMatrix.from_encoded";
constexpr const char* kFromGguf = "QuantMatrix.from_gguf";

/// Asked before a load has cost anything.
void require_cpu(const char* operation, const LoadOptions& options) {
  if (options.backend == nullptr) return;
  require<UnsupportedError>(options.backend->device_type() == DeviceType::Cpu, [&] {
    return Problem{.operation = operation,
                   .what = "device",
                   .expected = "cpu",
                   .got = to_string(options.backend->device()),
                   .hint =
                       "the experts of layers and stacks run there, matrices on their own only "
                       "on the CPU"};
  });
}

/// [N, K] as the one expert of a role.
ConstTensorView as_role(const ConstTensorView& values) {
  ConstTensorView view(values.data, values.dtype, {1, values.dim(0), values.dim(1)}, values.device);
  view.strides[1] = values.stride(0);
  view.strides[2] = values.stride(1);
  return view;
}

/// Values encoded in memory of their own.
RoleWeights encode(const ConstTensorView& values, QuantType type, const ConstTensorView& importance,
                   const LoadOptions& options) {
  RoleWeights weights = weights::allocate_rows(type, 1, values.dim(0), values.dim(1));
  ThreadPool alone(1);
  ThreadPool& pool = options.pool != nullptr ? *options.pool : alone;
  RoleWeights copy;  // encoders read the values of a row one behind the other
  ConstTensorView rows = values;
  if (values.dim(1) != 1 && values.stride(1) != 1) {
    copy = weights::copy_role(as_role(values));
    rows = ConstTensorView(copy.ref.base, values.dtype, {values.dim(0), values.dim(1)});
  }
  quantize_rows(type, rows, importance, weights::writable_rows(weights), pool);
  return weights;
}

/// The tensor of this name. Throws FormatError with the name that was most likely meant.
const GgufTensor& find_tensor(const GgufFile& file, const std::string& name) {
  const GgufTensor* const tensor = file.tensor(name);
  require<FormatError>(tensor != nullptr, [&] {
    std::vector<std::string_view> names;
    for (const GgufTensor& other : file.tensors()) names.push_back(other.name);
    return Problem{.operation = kFromGguf,
                   .what = quoted_word(name),
                   .expected = "a tensor of " + file.path().string(),
                   .got = "no such tensor",
                   .hint = nearest_hint(name, names)};
  });
  return *tensor;
}

/// The tensor that holds the factor of `name`; null without one.
const GgufTensor* scale_tensor(const GgufFile& file, const std::string& name) {
  constexpr std::string_view kWeight = ".weight";
  if (!name.ends_with(kWeight)) return nullptr;
  return file.tensor(name.substr(0, name.size() - kWeight.size()) + ".scale");
}

}  // namespace

QuantMatrix QuantMatrix::finish(const char* operation, RoleWeights weights, std::vector<float> bias,
                                const LoadOptions& options) {
  const QuantTraits& facts = traits(weights.ref.type);
  require<UnsupportedError>(facts.dequantize != nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "type",
                   .expected = "a weight type with a decoder",
                   .got = std::string(facts.name),
                   .hint = {}};
  });
  require<ShapeError>(bias.empty() || std::cmp_equal(bias.size(), weights.ref.rows), [&] {
    return Problem{.operation = operation,
                   .what = "bias",
                   .expected = std::to_string(weights.ref.rows) + " values",
                   .got = std::to_string(bias.size()),
                   .hint = {}};
  });
  if (!bias.empty()) {
    weights.bias = std::make_shared<const std::vector<float>>(std::move(bias));
  }
  if (options.dequantize) weights::dequantize_role(weights, *options.dequantize, options);
  if (options.backend != nullptr) {
    // Backends prepare the roles of a stack, and pass by those that it does not have.
    ExpertStack::Parts parts;
    parts.up = std::move(weights);
    options.backend->prepare(parts, options);
    weights = std::move(parts.up);
  }
  return QuantMatrix(std::move(weights));
}

QuantMatrix QuantMatrix::from_dense(const ConstTensorView& values, std::optional<QuantType> type,
                                    const ConstTensorView& importance, const LoadOptions& options,
                                    std::vector<float> bias) {
  require_cpu(kFromDense, options);
  require<ShapeError>(values.rank == 2 && !values.empty() && values.data != nullptr, [&] {
    return Problem{.operation = kFromDense,
                   .what = "values",
                   .expected = "[N, K], none of them 0",
                   .got = describe(values),
                   .hint = {}};
  });
  const QuantType stored = weights::dense_type(kFromDense, "values", values);
  // Without an encoder there is nothing that an importance could change, which the encoder says.
  if (importance.data == nullptr && type.value_or(stored) == stored) {
    return finish(kFromDense, weights::copy_role(as_role(values)), std::move(bias), options);
  }
  RoleWeights encoded = encode(values, type.value_or(stored), importance, options);
  const auto bytes = values.num_elements() * static_cast<std::int64_t>(size_of(values.dtype));
  weights::report_progress(options, bytes, bytes, "encode");
  return finish(kFromDense, std::move(encoded), std::move(bias), options);
}

QuantMatrix QuantMatrix::from_encoded(const Encoded& encoded, const LoadOptions& options,
                                      std::vector<float> bias) {
  require_cpu(kFromEncoded, options);
  require<ShapeError>(encoded.rows > 0 && encoded.cols > 0, [&] {
    return Problem{
        .operation = kFromEncoded,
        .what = "shape",
        .expected = "[N, K], none of them 0",
        .got = weights::shape_text(std::vector<std::int64_t>{encoded.rows, encoded.cols}),
        .hint = {}};
  });
  RoleWeights weights = weights::view_role(
      kFromEncoded, "data",
      {encoded.type, 1, encoded.rows, encoded.cols, encoded.data, encoded.bytes, encoded.owner});
  if (encoded.scale != 1.0F) {
    weights.scale = std::make_shared<const std::vector<float>>(1, encoded.scale);
  }
  return finish(kFromEncoded, std::move(weights), std::move(bias), options);
}

QuantMatrix QuantMatrix::from_gguf(const std::shared_ptr<GgufFile>& file, const std::string& name,
                                   const std::string& bias, const LoadOptions& options) {
  require_cpu(kFromGguf, options);
  weights::check_weight_cache(kFromGguf, *file, options);
  const GgufTensor& tensor = find_tensor(*file, name);
  const std::int64_t rows = tensor.ne(1), cols = tensor.ne(0);
  require<FormatError>(rows > 0 && cols > 0 && tensor.has_shape({rows, cols}), [&] {
    return Problem{.operation = kFromGguf,
                   .what = name,
                   .expected = "a matrix [N, K] or one row [K]",
                   .got = tensor.shape_text(),
                   .hint = tensor.rank > 2 ? "ExpertStack and MoeLayer load experts" : ""};
  });
  const BlockReader block(*file, -1, kFromGguf);
  RoleWeights weights = weights::stacked_role(block, tensor, 1, rows, 0, rows, cols);
  weights.scale = weights::single_scale(block, scale_tensor(*file, name));
  std::vector<float> values;
  if (!bias.empty()) values = weights::decode_tensor(block, find_tensor(*file, bias), {rows});
  const std::int64_t bytes = weights.ref.expert_bytes();
  weights::report_progress(options, bytes, bytes, name);
  return finish(kFromGguf, std::move(weights), std::move(values), options);
}

}  // namespace moesaic
