#include "offload/checkpoint.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/sizes.hpp"
#include "int4/columns.hpp"
#include "int4/panels.hpp"
#include "moesaic/error.hpp"
#include "offload/stored_rows.hpp"
#include "weights/load.hpp"

namespace moesaic::offload {
namespace {

constexpr const char* kOperation = "MoeExpertStore";
constexpr std::int64_t kRoleAlignment = 64;  // of the roles in a buffer

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kRoleAlignment - 1) / kRoleAlignment * kRoleAlignment;
}

/// What the reference of a role without experts points to: memory that nothing reads.
struct NoExperts {
  std::vector<std::int32_t> slots;  ///< [E], all -1
  int4::ColumnOrder order;          ///< of an INT4 role
  std::byte nothing{};
};

std::shared_ptr<const std::vector<float>> share(const std::vector<float>& values) {
  return values.empty() ? nullptr : std::make_shared<const std::vector<float>>(values);
}

RoleWeights role_without_experts(const StoredRole& role, std::int32_t experts, std::int64_t rows,
                                 std::int64_t cols) {
  const auto owner = std::make_shared<NoExperts>();
  owner->slots.assign(static_cast<std::size_t>(experts), -1);
  RoleWeights made;
  WeightRef& ref = made.ref;
  ref.base = &owner->nothing;
  ref.slot_map = owner->slots.data();
  ref.num_experts = experts;
  ref.rows = rows;
  ref.cols = cols;
  if (role.form == StoredForm::Int4) {
    const std::int64_t groups = int4::count_groups(cols, role.group_size);
    const std::int64_t group_size = role.group_size < 0 ? cols : role.group_size;
    owner->order = int4::order_columns(cols, group_size, groups, {});
    int4::describe_panels(ref, owner->order, group_size, groups, role.scale_f32,
                          role.symmetric != true);
    if (!owner->order.identity) ref.int4.gather = owner->order.column.data();
  } else {
    ref.type = role.type;
    require<UnsupportedError>(traits(role.type).dequantize != nullptr, [&] {
      return Problem{.operation = kOperation,
                     .what = role.source,
                     .expected = "a weight type with a decoder",
                     .got = std::string(traits(role.type).name),
                     .hint = {}};
    });
    ref.row_stride = row_bytes(role.type, cols);
    ref.expert_stride = product_of({rows, ref.row_stride}, kOperation, role.source);
  }
  made.owner = owner;
  made.bias = share(role.bias);
  made.scale = share(role.factor);
  return made;
}

/// One role of the layer, as the decoder makes it.
struct RolePlan {
  const StoredRole* stored = nullptr;
  WeightRef ref;            ///< its rows or panels
  std::int64_t at = 0;      ///< in the decoded bytes
  int4::ColumnOrder order;  ///< of INT4 panels
};

class CheckpointDecoder final : public ExpertDecoder {
 public:
  CheckpointDecoder(const StoredLayer& layer, const ExpertStack& stack)
      : gate_(layer.gate), up_(layer.up), down_(layer.down) {
    const StoredRole* const stored[] = {gate_ ? &*gate_ : nullptr, &up_, &down_};
    for (const Role role : kRoles) {
      const auto i = static_cast<std::size_t>(role);
      if (stored[i] == nullptr) continue;
      RolePlan& plan = plans_[i];
      plan.stored = stored[i];
      plan.ref = stack.role(role).ref;
      check_pieces(layer, plan);
      if (plan.stored->form == StoredForm::Int4) {
        plan.order =
            int4::order_columns(plan.ref.cols, plan.ref.int4.group_size, plan.ref.int4.groups, {});
      }
      if (plan.stored->form == StoredForm::Rows) continue;
      plan.at = nbytes_;
      nbytes_ += aligned(plan.stored->form == StoredForm::Int4 ? plan.ref.expert_stride
                                                               : plan.ref.expert_bytes());
    }
  }

  std::int64_t nbytes() const override { return nbytes_; }

  ExpertBytes decode(std::int32_t expert, const PieceBytes& pieces, std::byte* to) const override {
    ExpertBytes roles{};
    for (std::size_t i = 0; i < plans_.size(); ++i) {
      const RolePlan& plan = plans_[i];
      if (plan.stored == nullptr) continue;
      const StoredRole& stored = *plan.stored;
      const auto piece = [&](int number) {
        return number < 0 ? nullptr : pieces[static_cast<std::size_t>(number)];
      };
      const std::byte* const values = piece(stored.values);
      if (stored.form == StoredForm::Rows) {
        roles[i] = values + stored.first_row * plan.ref.row_stride;
        continue;
      }
      std::byte* const out = to + plan.at;
      const std::string& name = stored.names[static_cast<std::size_t>(expert)];
      if (stored.form == StoredForm::Int4) {
        write_int4(plan, values, piece(stored.scales), piece(stored.zeros), name, out);
      } else {
        decode_rows(stored, plan.ref.rows, plan.ref.cols, values, piece(stored.scales), name, out);
      }
      roles[i] = out;
    }
    return roles;
  }

 private:
  /// Every piece that a role reads is as long as the role needs.
  static void check_pieces(const StoredLayer& layer, const RolePlan& plan) {
    const StoredRole& stored = *plan.stored;
    const StoredBytes needed = stored_bytes(stored, plan.ref.rows, plan.ref.cols);
    const std::pair<int, std::int64_t> pieces[] = {{stored.values, needed.values},
                                                   {stored.scales, needed.scales},
                                                   {stored.zeros, needed.zeros}};
    for (std::size_t e = 0; e < layer.ranges.size(); ++e) {
      for (const auto& [number, bytes] : pieces) {
        if (bytes == 0) continue;
        const bool there = number >= 0 && std::cmp_less(number, layer.ranges[e].size());
        const std::int64_t found =
            there ? layer.ranges[e][static_cast<std::size_t>(number)].bytes : 0;
        require<FormatError>(found == bytes, [&] {
          return Problem{.operation = kOperation,
                         .what = "tensors of '" + stored.names[e] + "'",
                         .expected = std::to_string(bytes) + " bytes",
                         .got = std::to_string(found),
                         .hint = {}};
        });
      }
    }
  }

  static void write_int4(const RolePlan& plan, const std::byte* values, const std::byte* scales,
                         const std::byte* zeros, const std::string& name, std::byte* to) {
    const StoredRole& stored = *plan.stored;
    const std::int64_t k = plan.ref.cols, n = plan.ref.rows, groups = plan.ref.int4.groups;
    const bool by_row = stored.format == CheckpointFormat::PackQuantized;
    const auto view = [](const std::byte* data, DType dtype, std::int64_t rows, std::int64_t cols) {
      return ConstTensorView(data, dtype, {rows, cols}, Device{});
    };
    GptqTensors tensors;
    tensors.format = stored.format;
    tensors.group_size = stored.group_size;
    tensors.qweight = by_row                                   ? view(values, DType::I32, n, k / 8)
                      : stored.format == CheckpointFormat::Awq ? view(values, DType::I32, k, n / 8)
                                                               : view(values, DType::I32, k / 8, n);
    const DType scale_type = stored.scale == ScaleType::F16    ? DType::F16
                             : stored.scale == ScaleType::Bf16 ? DType::BF16
                                                               : DType::F32;
    tensors.scales =
        by_row ? view(scales, scale_type, n, groups) : view(scales, scale_type, groups, n);
    const std::int64_t words = (n + 7) / 8;
    if (zeros != nullptr && !all_in_the_middle(stored, zeros, groups, n)) {
      tensors.qzeros =
          by_row ? view(zeros, DType::I32, words, groups) : view(zeros, DType::I32, groups, words);
    }
    const int4::LinearReader reader(tensors, name);
    require<FormatError>(stored.symmetric != true || reader.symmetric(), [&] {
      return Problem{.operation = kOperation,
                     .what = "zero points of '" + name + "'",
                     .expected = "the middle of the codes everywhere, as sym=true says",
                     .got = "others",
                     .hint = {}};
    });
    std::memset(to, 0, static_cast<std::size_t>(plan.ref.expert_stride));
    for (std::int64_t panel = 0; panel * plan.ref.row_stride < plan.ref.expert_stride; ++panel) {
      int4::write_panel(reader, plan.ref.int4, plan.order.column.data(), plan.order.group.data(), 0,
                        panel, to);
    }
  }

  /// Whether the stored zero points of GPTQ all mean 8. Some writers store the point itself and say
  /// that it is one below, so that both 7 and 8 everywhere mean it, unless the configuration says
  /// that they differ.
  static bool all_in_the_middle(const StoredRole& stored, const std::byte* zeros,
                                std::int64_t groups, std::int64_t n) {
    const bool gptq =
        stored.format == CheckpointFormat::Gptq || stored.format == CheckpointFormat::GptqV2;
    if (!gptq || stored.symmetric == false) return false;
    const std::int64_t words = (n + 7) / 8;
    const auto* stored_words = reinterpret_cast<const std::uint32_t*>(zeros);
    for (const std::uint32_t middle : {8U, 7U}) {
      bool all = true;
      for (std::int64_t g = 0; all && g < groups; ++g) {
        for (std::int64_t i = 0; all && i < n; ++i) {
          all = (stored_words[g * words + i / 8] >> (4 * (i % 8)) & 15U) == middle;
        }
      }
      if (all) return true;
    }
    return false;
  }

  std::optional<StoredRole> gate_;
  StoredRole up_, down_;
  std::array<RolePlan, 3> plans_{};
  std::int64_t nbytes_ = 0;
};

}  // namespace

ExpertStack stack_without_experts(const StoredLayer& layer) {
  const auto [experts, hidden, intermediate] = layer.shape;
  require<ShapeError>(experts >= 1 && hidden >= 1 && intermediate >= 1, [&] {
    return Problem{
        .operation = kOperation,
        .what = "layer " + std::to_string(layer.block),
        .expected = "sizes of at least 1",
        .got = weights::shape_text(std::vector<std::int64_t>{experts, hidden, intermediate}),
        .hint = {}};
  });
  ExpertStack::Parts parts;
  parts.shape = layer.shape;
  const auto make = [&](Role role, const StoredRole& stored, std::int64_t rows, std::int64_t cols) {
    RoleWeights made = role_without_experts(stored, experts, rows, cols);
    weights::record(parts.report, role, made, stored.source, stored.decision, stored.reason);
    return made;
  };
  if (layer.gate) parts.gate = make(Role::Gate, *layer.gate, intermediate, hidden);
  parts.up = make(Role::Up, layer.up, intermediate, hidden);
  parts.down = make(Role::Down, layer.down, hidden, intermediate);
  return ExpertStack(std::move(parts));
}

std::shared_ptr<const ExpertDecoder> make_decoder(const StoredLayer& layer,
                                                  const ExpertStack& stack) {
  return std::make_shared<const CheckpointDecoder>(layer, stack);
}

}  // namespace moesaic::offload
