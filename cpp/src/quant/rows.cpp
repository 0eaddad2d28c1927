#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/names.hpp"
#include "moesaic/quantize.hpp"
#include "moesaic/thread_pool.hpp"
#include "quant/encode.hpp"

namespace moesaic {
namespace {

using quant::Encoder;

/// Values that one thread encodes between two looks at the interrupt: whole blocks of every type.
/// They are copied first, so that an encoder never sees a value change under it.
constexpr std::int64_t kPiece = 4096;

Encoder encoder_for(QuantType type, const char* operation) {
  const Encoder encoder = quant::encoder_of(type);
  require<UnsupportedError>(encoder.encode != nullptr, [&] {
    return Problem{operation, "quant", "a type with an encoder", std::string(traits(type).name),
                   "quant_types() says which have one"};
  });
  return encoder;
}

void check_importance(QuantType type, const Encoder& encoder, const char* operation) {
  require<UnsupportedError>(encoder.takes_importance, [&] {
    return Problem{operation, "weights", "none for " + std::string(traits(type).name),
                   "an importance matrix", "the encoder of this type has no use for one"};
  });
}

/// The first value that `encoder` does not take; -1 when there is none.
std::int64_t find_bad_value(const Encoder& encoder, const float* values, std::int64_t count) {
  if (std::isinf(encoder.largest)) return -1;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!(std::fabs(values[i]) <= encoder.largest)) return i;
  }
  return -1;
}

std::int64_t find_bad_importance(const float* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (!(values[i] >= 0.0f && values[i] <= std::numeric_limits<float>::max())) return i;
  }
  return -1;
}

std::string number_text(float value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g",
                static_cast<double>(std::isnan(value) ? std::fabs(value) : value));
  return text;
}

Problem bad_value(QuantType type, const Encoder& encoder, std::string where, float value,
                  const char* operation) {
  const std::string expected = "a finite number of magnitude at most " +
                               number_text(encoder.largest) + " for " +
                               std::string(traits(type).name);
  return {
      operation, std::move(where), expected, number_text(value),
      type == QuantType::NVFP4 && std::isfinite(value) ? "divide by a scale per tensor first" : ""};
}

/// "[1, 5, 17]" of element `flat` in row-major order.
std::string position_text(const ConstTensorView& view, std::int64_t flat) {
  std::string text;
  for (int i = view.rank - 1; i >= 0; --i) {
    text = std::to_string(flat % view.dim(i)) + (text.empty() ? "" : ", ") + text;
    flat /= view.dim(i);
  }
  return "[" + text + "]";
}

/// Where a row begins, in elements.
std::int64_t row_offset(const ConstTensorView& view, std::int64_t row) {
  std::int64_t offset = 0;
  for (int i = view.rank - 2; i >= 0; --i) {
    offset += row % view.dim(i) * view.stride(i);
    row /= view.dim(i);
  }
  return offset;
}

void copy_to_f32(const ConstTensorView& view, std::int64_t at, std::int64_t count, float* out) {
  const auto* const half = static_cast<const std::uint16_t*>(view.data) + at;
  switch (view.dtype) {
    case DType::F16:
      for (std::int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(half[i]);
      return;
    case DType::BF16:
      for (std::int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(half[i]);
      return;
    default:
      std::memcpy(out, static_cast<const float*>(view.data) + at,
                  static_cast<std::size_t>(count) * sizeof(float));
  }
}

/// `view` with the shape of `values`, along whose sizes of one it repeats. Throws ShapeError.
ConstTensorView broadcast(const ConstTensorView& view, const ConstTensorView& values,
                          const char* operation) {
  ConstTensorView wide = values;
  wide.data = view.data;
  wide.dtype = view.dtype;
  const int missing = values.rank - view.rank;
  bool fits =
      view.rank >= 1 && missing >= 0 && view.dim(view.rank - 1) == values.dim(values.rank - 1);
  for (int i = 0; fits && i < values.rank; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const std::int64_t size = i < missing ? 1 : view.dim(i - missing);
    fits = size == 1 || size == values.dim(i);
    wide.strides[at] = size == 1 && i + 1 < values.rank ? 0 : view.stride(i - missing);
  }
  require<ShapeError>(fits, [&] {
    std::string hint = "[cols], or sizes that broadcast";
    if (view.rank == 2 && values.rank == 3) hint = "weights of an expert each: weights[:, None]";
    return Problem{operation, "weights",
                   "[.., " + std::to_string(values.dim(values.rank - 1)) + "] that broadcasts to " +
                       describe(values),
                   describe(view), hint};
  });
  return wide;
}

void lower(std::atomic<std::int64_t>& least, std::int64_t value) {
  std::int64_t seen = least.load(std::memory_order_relaxed);
  while (value < seen && !least.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

}  // namespace

bool has_encoder(QuantType type) noexcept { return quant::encoder_of(type).encode != nullptr; }

bool takes_importance(QuantType type) noexcept { return quant::encoder_of(type).takes_importance; }

void quantize_row(QuantType type, const float* values, std::byte* row, std::int64_t cols,
                  const float* importance) {
  constexpr const char* kOperation = "quantize_row";
  const Encoder encoder = encoder_for(type, kOperation);
  if (importance != nullptr) check_importance(type, encoder, kOperation);
  row_bytes(type, cols);  // checks cols
  const std::int64_t bad = find_bad_value(encoder, values, cols);
  require<ConfigError>(bad < 0, [&] {
    return bad_value(type, encoder, "values[" + std::to_string(bad) + "]", values[bad], kOperation);
  });
  encoder.encode(values, importance, row, cols);
}

void quantize_row(QuantType type, const float* values, std::byte* row, std::int64_t cols) {
  quantize_row(type, values, row, cols, nullptr);
}

void quantize_rows(QuantType type, const ConstTensorView& values, const ConstTensorView& importance,
                   std::byte* out, ThreadPool& pool) {
  constexpr const char* kOperation = "quantize";
  const Encoder encoder = encoder_for(type, kOperation);
  require<DTypeError>(
      values.dtype == DType::F32 || values.dtype == DType::F16 || values.dtype == DType::BF16, [&] {
        return Problem{kOperation, "values", "f32, f16 or bf16", name_of(values.dtype),
                       "convert it first"};
      });
  require<ShapeError>(
      values.rank >= 1 && (values.dim(values.rank - 1) <= 1 || values.stride(values.rank - 1) == 1),
      [&] {
        return Problem{kOperation, "values", "[..., cols] with rows of neighbouring elements",
                       describe(values), ""};
      });
  const std::int64_t cols = values.dim(values.rank - 1);
  const std::int64_t bytes = row_bytes(type, cols);
  ConstTensorView weights;
  if (importance.data != nullptr) {
    check_importance(type, encoder, kOperation);
    require<DTypeError>(importance.dtype == DType::F32, [&] {
      return Problem{kOperation, "weights", "f32", name_of(importance.dtype), ""};
    });
    weights = broadcast(importance, values, kOperation);
  }
  if (values.empty()) return;

  const QuantTraits& facts = traits(type);
  const std::int64_t pieces = (cols + kPiece - 1) / kPiece;
  const std::int64_t rows = values.num_elements() / cols;
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> bad{kNone};
  std::atomic<std::int64_t> bad_weight{kNone};
  pool.parallel_for(rows * pieces, [&](std::int64_t chunk, int) {
    const std::int64_t row = chunk / pieces;
    const std::int64_t first = chunk % pieces * kPiece;
    const std::int64_t count = std::min(kPiece, cols - first);
    alignas(16) float x[kPiece];
    alignas(16) float w[kPiece];
    copy_to_f32(values, row_offset(values, row) + first, count, x);
    const std::int64_t at = find_bad_value(encoder, x, count);
    if (at >= 0) return lower(bad, row * cols + first + at);
    if (weights.data != nullptr) {
      copy_to_f32(weights, row_offset(weights, row) + first, count, w);
      const std::int64_t weight_at = find_bad_importance(w, count);
      if (weight_at >= 0) return lower(bad_weight, row * cols + first + weight_at);
    }
    encoder.encode(x, weights.data != nullptr ? w : nullptr,
                   out + row * bytes + first / facts.block_elems * facts.block_bytes, count);
  });
  const auto value_at = [cols](const ConstTensorView& view, std::int64_t flat) {
    float value;
    copy_to_f32(view, row_offset(view, flat / cols) + flat % cols, 1, &value);
    return value;
  };
  require<ConfigError>(bad == kNone, [&] {
    return bad_value(type, encoder, "values" + position_text(values, bad), value_at(values, bad),
                     kOperation);
  });
  require<ConfigError>(bad_weight == kNone, [&] {
    return Problem{kOperation, "weights" + position_text(weights, bad_weight),
                   "a finite number, 0 or more", number_text(value_at(weights, bad_weight)), ""};
  });
}

void dequantize_row(QuantType type, const std::byte* row, float* out, std::int64_t cols) {
  const QuantTraits& t = traits(type);
  require<UnsupportedError>(t.dequantize != nullptr, [&] {
    return Problem{"dequantize_row", "type", "a type of weights", std::string(t.name), ""};
  });
  row_bytes(type, cols);  // checks cols
  t.dequantize(row, out, cols);
}

void dequantize_rows(QuantType type, const std::byte* data, std::int64_t rows, std::int64_t cols,
                     float* out, ThreadPool& pool) {
  const QuantTraits& t = traits(type);
  require<UnsupportedError>(t.dequantize != nullptr, [&] {
    return Problem{"dequantize", "quant", "a type of weights", std::string(t.name), ""};
  });
  const std::int64_t bytes = row_bytes(type, cols);
  const std::int64_t pieces = (cols + kPiece - 1) / kPiece;
  pool.parallel_for(rows * pieces, [&](std::int64_t chunk, int) {
    const std::int64_t row = chunk / pieces;
    const std::int64_t first = chunk % pieces * kPiece;
    t.dequantize(data + row * bytes + first / t.block_elems * t.block_bytes,
                 out + row * cols + first, std::min(kPiece, cols - first));
  });
}

}  // namespace moesaic
