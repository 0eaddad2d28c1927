#include "weights/gguf_roles.hpp"

#include <memory>
#include <utility>
#include <vector>

namespace moesaic::weights {

RoleWeights stacked_role(const BlockReader& block, const GgufTensor& tensor, std::int64_t experts,
                         std::int64_t total_rows, std::int64_t first_row, std::int64_t rows,
                         std::int64_t cols) {
  const QuantTraits& facts = traits(tensor.quant);
  require<UnsupportedError>(facts.dequantize != nullptr, [&] {
    return Problem{.operation = block.operation(),
                   .what = tensor.name,
                   .expected = "a weight type with a decoder",
                   .got = std::string(facts.name),
                   .hint = {}};
  });
  require<FormatError>(cols % facts.block_elems == 0, [&] {
    return Problem{.operation = block.operation(),
                   .what = tensor.name,
                   .expected = "rows of a multiple of " + std::to_string(facts.block_elems) +
                               " elements (" + std::string(facts.name) + ")",
                   .got = std::to_string(cols),
                   .hint = {}};
  });
  RoleWeights weights;
  WeightRef& ref = weights.ref;
  ref.type = tensor.quant;
  ref.num_experts = static_cast<std::int32_t>(experts);
  ref.rows = rows;
  ref.cols = cols;
  ref.row_stride = row_bytes(tensor.quant, cols);
  ref.expert_stride = total_rows * ref.row_stride;
  GgufBytes bytes = block.bytes(tensor);
  require<FormatError>(
      static_cast<std::int64_t>(bytes.bytes.size()) >= experts * ref.expert_stride, [&] {
        return Problem{.operation = block.operation(),
                       .what = tensor.name,
                       .expected = std::to_string(experts * ref.expert_stride) + " bytes",
                       .got = std::to_string(bytes.bytes.size()),
                       .hint = {}};
      });
  ref.base = bytes.bytes.data() + first_row * ref.row_stride;
  weights.owner = std::move(bytes.owner);
  weights.read = block.file().reader();
  return weights;
}

RoleWeights per_expert_role(const BlockReader& block, std::span<const GgufTensor* const> tensors,
                            std::int64_t rows, std::int64_t cols) {
  struct Table {
    std::vector<const std::byte*> pointers;
    std::vector<std::shared_ptr<const void>> owners;
  };
  const auto table = std::make_shared<Table>();
  RoleWeights weights;
  for (const GgufTensor* tensor : tensors) {
    check_shape(*tensor, {rows, cols});
    require<FormatError>(tensor->quant == tensors.front()->quant, [&] {
      return Problem{
          .operation = "load_from_gguf",
          .what = tensor->name,
          .expected = "the type of expert 0, " + std::string(traits(tensors.front()->quant).name),
          .got = std::string(traits(tensor->quant).name),
          .hint = {}};
    });
    RoleWeights one = stacked_role(block, *tensor, 1, rows, 0, rows, cols);
    table->pointers.push_back(one.ref.base);
    table->owners.push_back(std::move(one.owner));
    weights.ref = one.ref;
    weights.read = std::move(one.read);
  }
  weights.ref.base = nullptr;
  weights.ref.table = table->pointers.data();
  weights.ref.expert_stride = 0;
  weights.ref.num_experts = static_cast<std::int32_t>(tensors.size());
  weights.owner = table;
  return weights;
}

RoleWeights single_role(const BlockReader& block, const GgufTensor& tensor, std::int64_t rows,
                        std::int64_t cols) {
  check_shape(tensor, {rows, cols});
  return stacked_role(block, tensor, 1, rows, 0, rows, cols);
}

std::shared_ptr<const std::vector<float>> single_scale(const BlockReader& block,
                                                       const GgufTensor* tensor, float factor) {
  std::vector<float> values{factor};
  if (tensor != nullptr) values.front() *= decode_tensor(block, *tensor, {1}).front();
  if (values.front() == 1.0F) return nullptr;
  return std::make_shared<const std::vector<float>>(std::move(values));
}

void record_roles(const BlockReader& block, ExpertStack::Parts& parts, const Sources& sources,
                  const LoadOptions& options) {
  const std::int64_t total = static_cast<std::int64_t>(parts.shape.num_experts) *
                                 (parts.gate.ref ? parts.gate.ref.expert_bytes() : 0) +
                             static_cast<std::int64_t>(parts.shape.num_experts) *
                                 (parts.up.ref.expert_bytes() + parts.down.ref.expert_bytes());
  std::int64_t done = 0;
  const auto note = [&](Role role, const RoleWeights& weights, const std::string& source) {
    if (!weights.ref) return;
    record(parts.report, role, weights, source, block.file().mapped() ? "mapped" : "read",
           block.file().mapped() ? "bytes stay in the file" : "the file was opened without mmap");
    done += parts.report.roles.back().bytes;
    report_progress(options, done, total, source);
  };
  note(Role::Gate, parts.gate, sources.gate);
  note(Role::Up, parts.up, sources.up);
  note(Role::Down, parts.down, sources.down);
}

}  // namespace moesaic::weights
