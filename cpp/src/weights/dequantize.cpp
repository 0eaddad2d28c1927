#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/first_error.hpp"
#include "base/pages.hpp"
#include "cpu/pack.hpp"
#include "int4/panels.hpp"
#include "moesaic/thread_pool.hpp"
#include "weights/load.hpp"

namespace moesaic {

namespace {

/// Throws unless the row is there to be read: in range, resident, and in host memory.
void check_readable(const char* operation, const WeightRef& weight, std::int32_t expert,
                    std::int64_t row) {
  require<ShapeError>(
      expert >= 0 && expert < weight.num_experts && row >= 0 && row < weight.rows, [&] {
        return Problem{.operation = operation,
                       .what = "position",
                       .expected = "expert < " + std::to_string(weight.num_experts) + ", row < " +
                                   std::to_string(weight.rows),
                       .got = std::to_string(expert) + ", " + std::to_string(row),
                       .hint = {}};
      });
  require<UnsupportedError>(weight.slot_map == nullptr || weight.slot_map[expert] >= 0, [&] {
    return Problem{.operation = operation,
                   .what = "expert " + std::to_string(expert),
                   .expected = "an expert in memory",
                   .got = "one that is not kept",
                   .hint = "stack.experts lists those that are"};
  });
  require<UnsupportedError>(weight.layout != WeightLayout::CudaUnits, [&] {
    return Problem{.operation = operation,
                   .what = "weights",
                   .expected = "host memory",
                   .got = "a CUDA device",
                   .hint = "load them without device="};
  });
}

}  // namespace

void dequantize_expert_row(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                           float* out) {
  check_readable("dequantize_expert_row", weight, expert, row);
  if (weight.type == QuantType::INT4) {
    int4::dequantize_int4_row(weight, expert, row, out);
    return;
  }
  if (weight.layout == WeightLayout::Rows) {
    dequantize_row(weight.type, weight.expert(expert) + row * weight.row_stride, out, weight.cols);
    return;
  }
  std::vector<std::byte> blocks(static_cast<std::size_t>(row_bytes(weight.type, weight.cols)));
  cpu::panel_row(weight, expert, row, blocks.data());
  dequantize_row(weight.type, blocks.data(), out, weight.cols);
}

void encoded_expert_row(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                        std::byte* out) {
  constexpr const char* kName = "encoded_expert_row";
  check_readable(kName, weight, expert, row);
  require<UnsupportedError>(weight.type != QuantType::INT4, [&] {
    return Problem{.operation = kName,
                   .what = "weights",
                   .expected = "a type with blocks along a row",
                   .got = "INT4",
                   .hint = "the MarlinExpertStack that holds them unpacks them"};
  });
  if (weight.layout == WeightLayout::Rows) {
    std::memcpy(out, weight.expert(expert) + row * weight.row_stride,
                static_cast<std::size_t>(row_bytes(weight.type, weight.cols)));
    return;
  }
  cpu::panel_row(weight, expert, row, out);
}

namespace weights {

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t d : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

void check_shape(const GgufTensor& tensor, std::initializer_list<std::int64_t> shape,
                 const char* operation) {
  require<FormatError>(tensor.has_shape(shape), [&] {
    return Problem{.operation = operation,
                   .what = tensor.name,
                   .expected = "shape " + shape_text({shape.begin(), shape.size()}),
                   .got = tensor.shape_text(),
                   .hint = {}};
  });
}

std::vector<float> decode_tensor(const BlockReader& block, const GgufTensor& tensor,
                                 std::initializer_list<std::int64_t> shape) {
  check_shape(tensor, shape, block.operation());
  std::int64_t count = 1;
  for (const std::int64_t d : shape) count *= d;
  const QuantTraits& facts = traits(tensor.quant);
  require<UnsupportedError>(facts.dequantize != nullptr, [&] {
    return Problem{.operation = block.operation(),
                   .what = tensor.name,
                   .expected = "a type with a decoder",
                   .got = std::string(facts.name),
                   .hint = {}};
  });
  const GgufBytes bytes = block.read(tensor);
  require<FormatError>(
      count % facts.block_elems == 0 &&
          static_cast<std::int64_t>(bytes.bytes.size()) >= row_bytes(tensor.quant, count),
      [&] {
        return Problem{.operation = block.operation(),
                       .what = tensor.name,
                       .expected = "whole blocks for " + std::to_string(count) + " elements",
                       .got = std::to_string(bytes.bytes.size()) + " bytes",
                       .hint = {}};
      });
  std::vector<float> values(static_cast<std::size_t>(count));
  dequantize_row(tensor.quant, bytes.bytes.data(), values.data(), count);
  return values;
}

std::vector<std::int32_t> read_ids(const BlockReader& block, const GgufTensor& tensor,
                                   std::initializer_list<std::int64_t> shape) {
  check_shape(tensor, shape);
  require<FormatError>(tensor.quant == QuantType::I32, [&] {
    return Problem{.operation = "load_from_gguf",
                   .what = tensor.name,
                   .expected = "I32",
                   .got = std::string(traits(tensor.quant).name),
                   .hint = {}};
  });
  const GgufBytes bytes = block.read(tensor);
  std::vector<std::int32_t> ids(bytes.bytes.size() / sizeof(std::int32_t));
  if (!ids.empty()) std::memcpy(ids.data(), bytes.bytes.data(), ids.size() * sizeof(std::int32_t));
  return ids;
}

namespace {

/// Decodes one role to `type`, expert after expert.
void decode_role(RoleWeights& weights, QuantType type, const LoadOptions& options,
                 std::int64_t& done, std::int64_t total) {
  const WeightRef from = weights.ref;
  WeightRef to = from;
  to.type = type;
  to.layout = WeightLayout::Rows;
  to.row_stride = row_bytes(type, from.cols);
  to.expert_stride = from.rows * to.row_stride;
  to.table = nullptr;
  to.slot_map = nullptr;
  to.int4 = {};
  const std::shared_ptr<std::byte> memory =
      allocate_pages(static_cast<std::size_t>(to.num_experts * to.expert_stride));
  to.base = memory.get();

  const int threads = options.pool != nullptr ? options.pool->threads() : 1;
  struct Row {
    std::vector<float> values;
    std::vector<std::byte> stored;
  };
  std::vector<Row> rows(static_cast<std::size_t>(threads));
  for (Row& row : rows) {
    row.values.resize(static_cast<std::size_t>(from.cols));
    if (weights.read) row.stored.resize(static_cast<std::size_t>(from.row_stride));
  }
  FirstError errors;
  for (std::int32_t e = 0; e < from.num_experts; ++e) {
    const auto decode = [&](std::int64_t row, int thread) {
      errors.during([&] {
        auto& [values, stored] = rows[static_cast<std::size_t>(thread)];
        if (weights.read) {
          weights.read(from.expert(e) + row * from.row_stride, stored);
          dequantize_row(from.type, stored.data(), values.data(), from.cols);
        } else {
          dequantize_expert_row(from, e, row, values.data());
        }
        quantize_row(type, values.data(), memory.get() + e * to.expert_stride + row * to.row_stride,
                     from.cols);
      });
    };
    if (options.pool != nullptr) {
      options.pool->parallel_for(from.rows, decode);
    } else {
      for (std::int64_t row = 0; row < from.rows; ++row) decode(row, 0);
    }
    errors.rethrow();
    done += to.expert_stride;
    report_progress(options, done, total, "dequantize");
  }
  weights.ref = to;
  weights.owner = memory;
  weights.read = nullptr;
  weights.origin = nullptr;
}

void require_dense(QuantType type) {
  require<UnsupportedError>(
      type == QuantType::F32 || type == QuantType::F16 || type == QuantType::BF16, [&] {
        return Problem{.operation = "load",
                       .what = "dequantize",
                       .expected = "F32, F16 or BF16",
                       .got = std::string(traits(type).name),
                       .hint = {}};
      });
}

/// Bytes of a role in rows of `type`.
std::int64_t decoded_bytes(const WeightRef& ref, QuantType type) {
  return ref.num_experts * ref.rows * row_bytes(type, ref.cols);
}

}  // namespace

void dequantize_role(RoleWeights& weights, QuantType type, const LoadOptions& options) {
  require_dense(type);
  if (weights.ref.type == type) return;
  std::int64_t done = 0;
  decode_role(weights, type, options, done, decoded_bytes(weights.ref, type));
}

void dequantize_roles(ExpertStack::Parts& parts, QuantType type, const LoadOptions& options) {
  require_dense(type);
  const std::pair<Role, RoleWeights*> roles[] = {
      {Role::Gate, &parts.gate}, {Role::Up, &parts.up}, {Role::Down, &parts.down}};
  std::int64_t total = 0, done = 0;
  for (const auto& [role, weights] : roles) {
    if (!weights->ref || weights->ref.type == type) continue;
    total += decoded_bytes(weights->ref, type);
  }
  for (const auto& [role, weights] : roles) {
    if (!weights->ref || weights->ref.type == type) continue;
    decode_role(*weights, type, options, done, total);
    for (RoleReport& report : parts.report.roles) {
      if (report.role != role) continue;
      report.kept = type;
      report.decision = "dequantized";
      report.reason = "asked for";
      report.bytes = weights->ref.num_experts * weights->ref.expert_bytes();
    }
  }
}

}  // namespace weights
}  // namespace moesaic
