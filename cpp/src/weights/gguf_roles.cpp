#include "weights/gguf_roles.hpp"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "base/hash.hpp"

namespace moesaic::weights {
namespace {

/// Where the matrices of a role lie that are no steps apart.
struct MatrixTable {
  std::vector<const std::byte*> pointers;
  std::vector<std::shared_ptr<const void>> owners;

  void add(const std::byte* matrix, std::shared_ptr<const void> owner) {
    pointers.push_back(matrix);
    owners.push_back(std::move(owner));
  }
};

std::shared_ptr<const WeightOrigin> make_origin(const GgufFile& file, const std::string& tensor,
                                                const Hash& selection) {
  if (!file.mapped()) return nullptr;
  return std::make_shared<const WeightOrigin>(
      WeightOrigin{file.fingerprint(), tensor, selection.value()});
}

/// Makes `weights` a role of the matrices in the table.
void point_to(const std::shared_ptr<MatrixTable>& table, RoleWeights& weights) {
  WeightRef& ref = weights.ref;
  ref.num_experts = static_cast<std::int32_t>(table->pointers.size());
  table->pointers.push_back(nullptr);  // so that there is a table where no expert is kept
  ref.base = nullptr;
  ref.table = table->pointers.data();
  ref.expert_stride = 0;
  weights.owner = table;
}

}  // namespace

RoleWeights stacked_role(const BlockReader& block, const GgufTensor& tensor, std::int64_t experts,
                         std::int64_t total_rows, std::int64_t first_row, std::int64_t rows,
                         std::int64_t cols, const KeptExperts* kept) {
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
  require<FormatError>(std::cmp_greater_equal(tensor.nbytes, experts * ref.expert_stride), [&] {
    return Problem{.operation = block.operation(),
                   .what = tensor.name,
                   .expected = std::to_string(experts * ref.expert_stride) + " bytes",
                   .got = std::to_string(tensor.nbytes),
                   .hint = {}};
  });
  weights.read = block.file().reader();
  weights.origin = origin_of(block, tensor, first_row, rows, kept);
  if (kept != nullptr) {
    const auto table = std::make_shared<MatrixTable>();
    for (const std::int32_t e : kept->ids) {
      const std::int64_t begin = e * ref.expert_stride + first_row * ref.row_stride;
      GgufBytes matrix = block.bytes(tensor, begin, rows * ref.row_stride);
      table->add(matrix.bytes.data(), std::move(matrix.owner));
    }
    if (kept->ids.empty()) block.pass_over(tensor);
    point_to(table, weights);
    return weights;
  }
  GgufBytes bytes = block.bytes(tensor);
  ref.base = bytes.bytes.data() + first_row * ref.row_stride;
  weights.owner = std::move(bytes.owner);
  return weights;
}

RoleWeights per_expert_role(const BlockReader& block, std::span<const GgufTensor* const> tensors,
                            std::int64_t rows, std::int64_t cols, const KeptExperts* kept) {
  const auto table = std::make_shared<MatrixTable>();
  RoleWeights weights;
  const KeptExperts left_out{1, {}};
  Hash selection;
  for (std::size_t e = 0; e < tensors.size(); ++e) {
    const GgufTensor& tensor = *tensors[e];
    check_shape(tensor, {rows, cols});
    require<FormatError>(tensor.quant == tensors.front()->quant, [&] {
      return Problem{
          .operation = "load_from_gguf",
          .what = tensor.name,
          .expected = "the type of expert 0, " + std::string(traits(tensors.front()->quant).name),
          .got = std::string(traits(tensor.quant).name),
          .hint = {}};
    });
    const bool here =
        kept == nullptr || std::ranges::binary_search(kept->ids, static_cast<std::int32_t>(e));
    RoleWeights one =
        stacked_role(block, tensor, 1, rows, 0, rows, cols, here ? nullptr : &left_out);
    weights.ref = one.ref;
    weights.read = std::move(one.read);
    if (!here) continue;
    table->add(one.ref.base, std::move(one.owner));
    selection.add(tensor.name);
  }
  point_to(table, weights);
  weights.origin = make_origin(block.file(), tensors.front()->name, selection);
  return weights;
}

std::shared_ptr<const WeightOrigin> origin_of(const BlockReader& block, const GgufTensor& tensor,
                                              std::int64_t first_row, std::int64_t rows,
                                              const KeptExperts* kept) {
  Hash selection;
  selection.add(tensor.name);
  selection.add(static_cast<std::uint64_t>(first_row));
  selection.add(static_cast<std::uint64_t>(rows));
  if (kept != nullptr) {
    for (const std::int32_t id : kept->ids) selection.add(static_cast<std::uint64_t>(id));
  }
  return make_origin(block.file(), tensor.name, selection);
}

void check_weight_cache(const char* operation, const GgufFile& file, const LoadOptions& options) {
  if (!options.weight_cache) return;
  check_weight_cache(operation, options);
  require<ConfigError>(file.mapped(), [&] {
    return Problem{.operation = operation,
                   .what = "weight_cache",
                   .expected = "a mapped file",
                   .got = "one that was opened without mmap",
                   .hint = "its tensors are read whole before anything is looked up"};
  });
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
  std::int64_t total = 0, done = 0;
  for (const RoleWeights* role : {&parts.gate, &parts.up, &parts.down}) {
    if (role->ref) total += role->ref.num_experts * role->ref.expert_bytes();
  }
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
