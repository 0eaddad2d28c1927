#include "weights/builder.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "base/pages.hpp"
#include "base/sizes.hpp"
#include "cpu/pack.hpp"
#include "weights/check_codes.hpp"

namespace moesaic::weights {
namespace {

Problem problem(std::string what, std::string expected, std::string got) {
  return {.operation = "ExpertStack builder",
          .what = std::move(what),
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = {}};
}

}  // namespace

Builder::Builder(const StackShape& shape, const RoleSpec* gate, const RoleSpec& up,
                 const RoleSpec& down, std::optional<std::vector<std::int32_t>> ids)
    : shape_(shape) {
  const auto [experts, hidden, intermediate] = shape;
  require<ShapeError>(experts >= 1 && hidden >= 1 && intermediate >= 1, [&] {
    return problem("shape", "E, I and H of at least 1",
                   shape_text(std::vector<std::int64_t>{experts, intermediate, hidden}));
  });
  if (ids) {
    kept_ = keep_experts("ExpertStack builder", *std::move(ids), experts);
    shape_.num_experts = kept_->count();
  }
  if (gate != nullptr) make(Role::Gate, *gate, intermediate, hidden);
  make(Role::Up, up, intermediate, hidden);
  make(Role::Down, down, hidden, intermediate);
}

void Builder::make(Role role, const RoleSpec& spec, std::int64_t rows, std::int64_t cols) {
  const QuantTraits& facts = traits(spec.type);
  require<UnsupportedError>(facts.dequantize != nullptr, [&] {
    return problem(name_of(role), "a weight type with a decoder", std::string(facts.name));
  });
  require<ShapeError>(cols % facts.block_elems == 0, [&] {
    return problem(
        std::string(name_of(role)) + " columns",
        "a multiple of " + std::to_string(facts.block_elems) + " (" + std::string(facts.name) + ")",
        std::to_string(cols));
  });
  const auto experts = static_cast<std::size_t>(shape_.num_experts);
  RoleBuffer& buffer = buffers_.emplace_back();
  buffer.role = role;
  buffer.spec = spec;
  WeightRef& ref = buffer.weights.ref;
  ref.type = spec.type;
  ref.num_experts = shape_.num_experts;
  ref.rows = rows;
  ref.cols = cols;
  ref.row_stride = row_bytes(spec.type, cols);
  const std::int64_t bytes =
      product_of({shape_.num_experts, rows, ref.row_stride}, "ExpertStack builder", name_of(role));
  ref.expert_stride = rows * ref.row_stride;
  // A role without experts has memory too: a reference without any is one of no weights.
  const std::shared_ptr<std::byte> memory =
      allocate_pages(static_cast<std::size_t>(std::max(bytes, ref.row_stride)));
  buffer.seen.assign(experts, false);
  buffer.scales.assign(experts, 1.0F);
  buffer.memory = memory.get();
  ref.base = memory.get();
  buffer.weights.owner = memory;
}

Builder::RoleBuffer& Builder::buffer_of(Role role) {
  const auto buffer = std::ranges::find(buffers_, role, &RoleBuffer::role);
  require<ShapeError>(buffer != buffers_.end(),
                      [&] { return problem("role", "a role of this stack", name_of(role)); });
  return *buffer;
}

std::vector<Role> Builder::find_cached(const std::vector<RoleOrigin>& origins,
                                       const LoadOptions& options) {
  if (!options.weight_cache) return {};
  check_weight_cache("ExpertStack builder", options);
  std::vector<Role> found;
  for (const auto& [role, origin] : origins) {
    RoleBuffer& buffer = buffer_of(role);
    if (buffer.weights.ref.num_experts == 0) continue;  // nothing is packed
    buffer.weights.origin = std::make_shared<const WeightOrigin>(origin);
    std::optional<std::string> reason = cpu::take_cached_panels(buffer.weights, options);
    if (!reason) continue;
    buffer.memory = nullptr;
    buffer.spec.decision = "cached";
    buffer.spec.reason = *std::move(reason);
    found.push_back(role);
  }
  return found;
}

void Builder::add(Role role, std::int32_t expert, std::span<const std::byte> rows, float scale,
                  std::span<const float> bias) {
  RoleBuffer& buffer = buffer_of(role);
  const std::string what = std::string(name_of(role)) + " of expert " + std::to_string(expert);
  const std::int32_t place =
      kept_ ? static_cast<std::int32_t>(std::ranges::lower_bound(kept_->ids, expert) -
                                        kept_->ids.begin())
            : expert;
  const bool there = place >= 0 && place < shape_.num_experts;
  const auto e = static_cast<std::size_t>(place);
  require<ShapeError>(there && id_of(e) == expert, [&] {
    return problem(what,
                   kept_ ? "an expert that is kept"
                         : "an expert of 0 to " + std::to_string(shape_.num_experts - 1),
                   "another");
  });
  require<ShapeError>(!buffer.seen[e], [&] { return problem(what, "it once", "it again"); });
  const WeightRef& ref = buffer.weights.ref;
  const std::int64_t bytes = buffer.memory != nullptr ? ref.expert_stride : 0;
  require<ShapeError>(std::cmp_equal(rows.size(), bytes), [&] {
    return problem(what, std::to_string(bytes) + " bytes", std::to_string(rows.size()));
  });
  require<ShapeError>(bias.empty() || std::cmp_equal(bias.size(), ref.rows), [&] {
    return problem(what + " bias", std::to_string(ref.rows) + " values",
                   std::to_string(bias.size()));
  });
  check_codes("ExpertStack builder", what, ref.type, rows, ref.cols);
  if (bytes > 0) std::memcpy(buffer.memory + place * bytes, rows.data(), rows.size());
  buffer.scales[e] = scale;
  if (!bias.empty()) {
    const auto width = static_cast<std::size_t>(ref.rows);
    buffer.biases.resize(buffer.seen.size() * width);
    std::ranges::copy(bias, buffer.biases.begin() + static_cast<std::ptrdiff_t>(e * width));
    ++buffer.with_bias;
  }
  buffer.seen[e] = true;
}

std::int32_t Builder::id_of(std::size_t place) const {
  return kept_ ? kept_->ids[place] : static_cast<std::int32_t>(place);
}

RoleWeights Builder::take(RoleBuffer& buffer, LoadReport& report) const {
  const std::string name = name_of(buffer.role);
  const auto missing = std::ranges::find(buffer.seen, false);
  require<ShapeError>(missing == buffer.seen.end(), [&] {
    return problem(
        name, "every expert",
        "nothing for expert " +
            std::to_string(id_of(static_cast<std::size_t>(missing - buffer.seen.begin()))));
  });
  require<ShapeError>(buffer.with_bias == 0 || buffer.with_bias == shape_.num_experts, [&] {
    return problem(name + " bias", "one for every expert or for none",
                   std::to_string(buffer.with_bias) + " of " + std::to_string(shape_.num_experts));
  });
  if (buffer.with_bias != 0) {
    buffer.weights.bias = std::make_shared<const std::vector<float>>(std::move(buffer.biases));
  }
  if (std::ranges::any_of(buffer.scales, [](float scale) { return scale != 1.0F; })) {
    buffer.weights.scale = std::make_shared<const std::vector<float>>(std::move(buffer.scales));
  }
  record(report, buffer.role, buffer.weights, std::move(buffer.spec.source),
         std::move(buffer.spec.decision), std::move(buffer.spec.reason));
  // Rows are counted by prepare() once they are panels, whose last may have more of them.
  const WeightRef& ref = buffer.weights.ref;
  if (buffer.memory == nullptr) report.roles.back().bytes = ref.num_experts * ref.expert_stride;
  return std::move(buffer.weights);
}

ExpertStack Builder::build(const LoadOptions& options) && {
  std::vector<RoleBuffer> buffers = std::exchange(buffers_, {});
  require<ShapeError>(!buffers.empty(), [] { return problem("build", "one call", "another"); });
  ExpertStack::Parts parts;
  parts.shape = shape_;
  for (RoleBuffer& buffer : buffers) {
    RoleWeights& to = buffer.role == Role::Gate ? parts.gate
                      : buffer.role == Role::Up ? parts.up
                                                : parts.down;
    to = take(buffer, parts.report);
  }
  return kept_ ? finish_kept(std::move(parts), *kept_, options, start_)
               : finish(std::move(parts), options, start_);
}

}  // namespace moesaic::weights
