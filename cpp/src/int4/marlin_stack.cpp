#include "moesaic/marlin_stack.hpp"

#include <string>
#include <utility>

#include "base/pages.hpp"
#include "base/sizes.hpp"
#include "int4/checkpoint.hpp"
#include "int4/columns.hpp"
#include "int4/panels.hpp"
#include "int4/to_device.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic {
namespace {

constexpr std::int64_t kPanelRows = 16;
constexpr std::int64_t kTileCols = 64;  // what the tiles of Marlin kernels can be cut at

std::int64_t panels_of(std::int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

Problem problem(std::string what, std::string expected, std::string got, std::string hint = {}) {
  return {.operation = "MarlinExpertStack",
          .what = std::move(what),
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = std::move(hint)};
}

/// The memory that a stack's WeightRef points into.
struct Memory {
  std::shared_ptr<std::byte> panels;
  std::vector<std::int32_t> gather;
};

/// The rows of g_idx one behind the other: one for all experts or one each; empty when the groups
/// are k / group_size.
std::vector<std::int32_t> read_orders(const MarlinExpertStack::Spec& spec, std::int64_t groups) {
  std::vector<std::int32_t> all;
  const ConstTensorView& g_idx = spec.g_idx;
  if (g_idx.data == nullptr) return all;
  require<ShapeError>(
      g_idx.rank == 1 || (g_idx.rank == 2 && g_idx.dim(0) == spec.num_experts), [&] {
        return problem("g_idx",
                       "[" + std::to_string(spec.k) + "] or [" + std::to_string(spec.num_experts) +
                           ", " + std::to_string(spec.k) + "]",
                       describe(g_idx));
      });
  GptqTensors holder;
  holder.g_idx = g_idx;
  for (std::int32_t e = 0; e < (g_idx.rank == 2 ? spec.num_experts : 1); ++e) {
    const auto row = int4::read_g_idx(int4::expert_slice(holder, e).g_idx, spec.k, groups, "g_idx");
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

}  // namespace

struct MarlinExpertStack::Builder::State {
  Spec spec;
  int4::ColumnOrder order;
  bool per_expert_order = false;
  std::shared_ptr<Memory> memory = std::make_shared<Memory>();
  MarlinExpertStack stack;
  std::vector<std::int64_t> filled;  ///< columns per expert
};

MarlinExpertStack::Builder::Builder(const Spec& spec) : state_(std::make_unique<State>()) {
  const auto in_range = [](std::int64_t size) { return size >= 1 && size < INT32_MAX; };
  require<ShapeError>(
      spec.num_experts >= 1 && in_range(spec.k) && in_range(spec.n_per_expert), [&] {
        return problem("size", "at least one expert, row and column, below 2^31",
                       std::to_string(spec.num_experts) + " experts of [" + std::to_string(spec.k) +
                           ", " + std::to_string(spec.n_per_expert) + "]");
      });
  require<ShapeError>(spec.group_size == -1 || spec.group_size >= 1, [&] {
    return problem("group_size", "-1 or at least 1", std::to_string(spec.group_size));
  });
  State& s = *state_;
  s.spec = spec;
  const std::int64_t groups = int4::count_groups(spec.k, spec.group_size);
  std::vector<std::int32_t> g_idx = read_orders(spec, groups);
  s.per_expert_order = static_cast<std::int64_t>(g_idx.size()) > spec.k;
  const std::int64_t group_size = spec.group_size < 0 ? spec.k : spec.group_size;
  s.order = int4::order_columns(spec.k, group_size, groups, g_idx);
  s.spec.g_idx = {};  // it viewed memory of the caller, which may be gone later
  s.filled.assign(static_cast<std::size_t>(spec.num_experts), 0);

  WeightRef& ref = s.stack.weights_.ref;
  ref.num_experts = spec.num_experts;
  ref.rows = spec.n_per_expert;
  ref.cols = spec.k;
  int4::describe_panels(ref, s.order, group_size, groups, spec.scale_dtype != DType::F16,
                        spec.zeros);
  if (!s.order.identity) {
    s.memory->gather = s.order.column;
    ref.int4.gather = s.memory->gather.data();
    ref.int4.gather_stride = s.per_expert_order ? s.order.packed_cols : 0;
  }
  s.memory->panels = allocate_pages(static_cast<std::size_t>(product_of(
      {spec.num_experts, panels_of(ref.rows), ref.row_stride}, "MarlinExpertStack", "size")));
  ref.base = s.memory->panels.get();
  s.stack.weights_.owner = s.memory;
  if (!g_idx.empty()) {
    s.stack.g_idx_ = std::make_shared<const std::vector<std::int32_t>>(std::move(g_idx));
  }
}

MarlinExpertStack::Builder::~Builder() = default;
MarlinExpertStack::Builder::Builder(Builder&&) noexcept = default;

void MarlinExpertStack::Builder::add(std::int32_t expert, std::int64_t first_col,
                                     const GptqTensors& part, const std::string& name,
                                     ThreadPool* pool) {
  State& s = live_state();
  const WeightRef& ref = s.stack.weights_.ref;
  GptqTensors tensors = part;
  tensors.group_size = s.spec.group_size;
  tensors.format = s.spec.format;
  const int4::LinearReader reader(tensors, name);
  require<ShapeError>(expert >= 0 && expert < ref.num_experts, [&] {
    return problem(name + " expert", "0 .. " + std::to_string(ref.num_experts - 1),
                   std::to_string(expert));
  });
  require<ShapeError>(
      reader.k() == ref.cols && first_col >= 0 && first_col <= ref.rows - reader.n(), [&] {
        return problem(
            name + ".qweight",
            "K " + std::to_string(ref.cols) + " and columns within " + std::to_string(ref.rows),
            "K " + std::to_string(reader.k()) + " and " + std::to_string(reader.n()) +
                " columns from " + std::to_string(first_col) + " on");
      });
  require<FormatError>(ref.int4.scale_f32 || reader.scale_dtype() == DType::F16, [&] {
    return problem(name + ".scales", "f16, like the rest of the stack",
                   name_of(reader.scale_dtype()));
  });
  require<FormatError>(ref.int4.zeros || reader.symmetric(), [&] {
    return problem(name + ".qzeros", "zero points of 8 everywhere (symmetric)", "others",
                   "the checkpoint's config says sym=true, its tensors do not");
  });
  const std::size_t order = s.per_expert_order ? static_cast<std::size_t>(expert) : 0;
  const std::int32_t* column =
      s.order.column.data() + order * static_cast<std::size_t>(s.order.packed_cols);
  const std::int32_t* group =
      s.order.group.data() + order * static_cast<std::size_t>(s.order.scale_groups);
  std::byte* to = s.memory->panels.get() + expert * ref.expert_stride;
  const std::int64_t first = first_col / kPanelRows;
  const std::int64_t count = panels_of(first_col + reader.n()) - first;
  const auto write = [&](std::int64_t panel, int) {
    int4::write_panel(reader, ref.int4, column, group, first_col, first + panel, to);
  };
  if (pool != nullptr) {
    pool->parallel_for(count, write);
  } else {
    for (std::int64_t panel = 0; panel < count; ++panel) write(panel, 0);
  }
  s.filled[static_cast<std::size_t>(expert)] += reader.n();
}

MarlinExpertStack::Builder::State& MarlinExpertStack::Builder::live_state() const {
  require<ShapeError>(state_ != nullptr, [] {
    return problem("Builder", "one that has not built its stack", "one that has");
  });
  return *state_;
}

MarlinExpertStack MarlinExpertStack::Builder::build() && {
  State& s = live_state();
  for (std::size_t e = 0; e < s.filled.size(); ++e) {
    require<ShapeError>(s.filled[e] == s.spec.n_per_expert, [&] {
      return problem("expert " + std::to_string(e),
                     std::to_string(s.spec.n_per_expert) + " columns", std::to_string(s.filled[e]));
    });
  }
  const std::unique_ptr<State> done = std::move(state_);
  return std::move(done->stack);
}

MarlinExpertStack MarlinExpertStack::from_gptq(const GptqTensors& tensors, ThreadPool* pool) {
  require<ShapeError>(tensors.qweight.rank == 3 && tensors.qweight.dim(0) >= 1 &&
                          tensors.qweight.dim(0) <= INT32_MAX,
                      [&] {
                        return problem("qweight",
                                       "[E, K/8, N]; awq: [E, K, N/8]; pack_quantized: [E, N, K/8]",
                                       describe(tensors.qweight));
                      });
  const auto experts = static_cast<std::int32_t>(tensors.qweight.dim(0));
  const auto check_stacked = [&](const ConstTensorView& view, const char* name) {
    require<ShapeError>(view.rank == 3 && view.dim(0) == experts, [&] {
      return problem(name, "[" + std::to_string(experts) + ", .., ..]", describe(view));
    });
  };
  check_stacked(tensors.scales, "scales");
  if (tensors.qzeros.data != nullptr) check_stacked(tensors.qzeros, "qzeros");
  const int4::LinearSize size = int4::linear_size(tensors, "tensors");
  Spec spec{.num_experts = experts,
            .k = size.k,
            .n_per_expert = size.n,
            .group_size = tensors.group_size,
            .format = tensors.format,
            .scale_dtype = tensors.scales.dtype,
            .zeros = false,
            .g_idx = tensors.g_idx};
  for (std::int32_t e = 0; e < experts; ++e) {
    const int4::LinearReader reader(int4::expert_slice(tensors, e), "tensors");
    spec.zeros = spec.zeros || !reader.symmetric();
  }
  Builder builder(spec);
  for (std::int32_t e = 0; e < experts; ++e) {
    builder.add(e, 0, int4::expert_slice(tensors, e), "expert " + std::to_string(e), pool);
  }
  return std::move(builder).build();
}

RoleWeights MarlinExpertStack::columns(std::int64_t first_col, std::int64_t cols) const {
  require<ShapeError>(
      first_col >= 0 && first_col % kPanelRows == 0 && cols >= 1 &&
          first_col <= n_per_expert() - cols,
      [&] {
        return problem("columns",
                       "a part of " + std::to_string(n_per_expert()) + " from a multiple of 16 on",
                       std::to_string(cols) + " from " + std::to_string(first_col));
      });
  RoleWeights part = weights_;
  part.ref.base += first_col / kPanelRows * part.ref.row_stride;
  part.ref.rows = cols;
  return part;
}

RoleWeights MarlinExpertStack::copy_columns(std::int64_t first_col, std::int64_t cols) const {
  require<ShapeError>(first_col >= 0 && cols >= 1 && first_col <= n_per_expert() - cols, [&] {
    return problem("columns", "a part of " + std::to_string(n_per_expert()),
                   std::to_string(cols) + " from " + std::to_string(first_col));
  });
  const WeightRef& from = weights_.ref;
  struct Copy {
    std::shared_ptr<std::byte> panels;
    std::shared_ptr<const void> original;  // keeps the gather index alive
  };
  const auto memory = std::make_shared<Copy>();
  RoleWeights part = weights_;
  part.ref.rows = cols;
  part.ref.expert_stride = panels_of(cols) * from.row_stride;
  memory->panels =
      allocate_pages(static_cast<std::size_t>(from.num_experts * part.ref.expert_stride));
  memory->original = weights_.owner;
  for (std::int32_t e = 0; e < from.num_experts; ++e) {
    std::byte* const to = memory->panels.get() + e * part.ref.expert_stride;
    for (std::int64_t row = 0; row < cols; ++row) {
      int4::copy_row(from.int4, from.expert(e), first_col + row, to, row);
    }
  }
  part.ref.base = memory->panels.get();
  part.owner = memory;
  return part;
}

Int4Matrix MarlinExpertStack::unpack(std::int32_t expert) const {
  require<ShapeError>(expert >= 0 && expert < num_experts(), [&] {
    return problem("expert", "0 .. " + std::to_string(num_experts() - 1), std::to_string(expert));
  });
  const Int4Format& format = weights_.ref.int4;
  Int4Matrix m;
  m.k = k();
  m.n = n_per_expert();
  m.group_size = format.group_size;
  m.groups = format.groups;
  if (g_idx_ != nullptr) {
    const std::int64_t first = static_cast<std::int64_t>(g_idx_->size()) > m.k ? expert * m.k : 0;
    m.g_idx.assign(g_idx_->begin() + first, g_idx_->begin() + first + m.k);
  }
  m.codes.resize(static_cast<std::size_t>(m.k * m.n));
  m.scales.resize(static_cast<std::size_t>(m.groups * m.n));
  m.zeros.assign(static_cast<std::size_t>(m.groups * m.n), int4::LinearReader::kSymmetricZero);
  const std::int32_t* gather = format.gather_of(expert);
  for (std::int64_t j = 0; j < format.packed_cols; ++j) {
    const std::int64_t row = gather != nullptr ? gather[j] : j;
    if (row < 0) continue;
    const std::int64_t group = m.group_of(row);
    for (std::int64_t n = 0; n < m.n; ++n) {
      const int4::Int4Value v = int4::read_panel(weights_.ref, expert, n, j);
      m.codes[static_cast<std::size_t>(row * m.n + n)] = static_cast<std::uint8_t>(v.code);
      m.scales[static_cast<std::size_t>(group * m.n + n)] = v.scale;
      m.zeros[static_cast<std::size_t>(group * m.n + n)] = static_cast<std::uint8_t>(v.zero);
    }
  }
  return m;
}

MarlinLinear MarlinExpertStack::make_expert_linear(std::int32_t expert, std::int64_t first_col,
                                                   std::int64_t cols,
                                                   std::vector<float> bias) const {
  const std::int64_t n = n_per_expert();
  require<ShapeError>(expert >= 0 && expert < num_experts(), [&] {
    return problem("make_expert_linear expert", "0 .. " + std::to_string(num_experts() - 1),
                   std::to_string(expert));
  });
  if (cols == -1 && first_col >= 0) cols = n - first_col;
  require<ShapeError>(
      first_col >= 0 && cols >= 1 && first_col <= n - cols && first_col % kTileCols == 0 &&
          (cols % kTileCols == 0 || first_col + cols == n),
      [&] {
        return problem("make_expert_linear columns",
                       "multiples of 64 within " + std::to_string(n) + ", or up to its end",
                       std::to_string(cols) + " from column " + std::to_string(first_col));
      });
  require<ShapeError>(bias.empty() || static_cast<std::int64_t>(bias.size()) == cols, [&] {
    return problem("make_expert_linear bias", std::to_string(cols) + " values",
                   std::to_string(bias.size()));
  });
  RoleWeights one = columns(first_col, cols);
  one.ref.base += expert * one.ref.expert_stride;
  one.ref.int4.gather = one.ref.int4.gather_of(expert);
  one.ref.int4.gather_stride = 0;
  one.ref.num_experts = 1;
  if (!bias.empty()) one.bias = std::make_shared<const std::vector<float>>(std::move(bias));
  if (backend_ == nullptr) return MarlinLinear(std::move(one), Device{});
  LoadOptions options;
  options.backend = backend_;
  return MarlinLinear(int4::to_device(one, options), device());
}

}  // namespace moesaic
