#include "weights/builder.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "base/pages.hpp"

namespace moesaic::stack {
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
                 const RoleSpec& down)
    : shape_(shape) {
  const auto [experts, hidden, intermediate] = shape;
  require<ShapeError>(experts >= 1 && hidden >= 1 && intermediate >= 1, [&] {
    return problem("shape", "E, I and H of at least 1",
                   shape_text(std::vector<std::int64_t>{experts, intermediate, hidden}));
  });
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
  Place& place = places_.emplace_back();
  place.role = role;
  place.spec = spec;
  place.seen.assign(experts, false);
  place.scales.assign(experts, 1.0F);
  WeightRef& ref = place.weights.ref;
  ref.type = spec.type;
  ref.num_experts = shape_.num_experts;
  ref.rows = rows;
  ref.cols = cols;
  ref.row_stride = row_bytes(spec.type, cols);
  ref.expert_stride = rows * ref.row_stride;
  const std::shared_ptr<std::byte> memory =
      allocate_pages(experts * static_cast<std::size_t>(ref.expert_stride));
  place.memory = memory.get();
  ref.base = memory.get();
  place.weights.owner = memory;
}

void Builder::add(Role role, std::int32_t expert, std::span<const std::byte> rows, float scale,
                  std::span<const float> bias) {
  const auto place = std::ranges::find(places_, role, &Place::role);
  require<ShapeError>(place != places_.end(),
                      [&] { return problem("role", "a role of this stack", name_of(role)); });
  const std::string what = std::string(name_of(role)) + " of expert " + std::to_string(expert);
  require<ShapeError>(expert >= 0 && expert < shape_.num_experts, [&] {
    return problem(what, "an expert of 0 to " + std::to_string(shape_.num_experts - 1), "another");
  });
  const auto e = static_cast<std::size_t>(expert);
  require<ShapeError>(!place->seen[e], [&] { return problem(what, "it once", "it again"); });
  const WeightRef& ref = place->weights.ref;
  require<ShapeError>(std::cmp_equal(rows.size(), ref.expert_stride), [&] {
    return problem(what, std::to_string(ref.expert_stride) + " bytes", std::to_string(rows.size()));
  });
  require<ShapeError>(bias.empty() || std::cmp_equal(bias.size(), ref.rows), [&] {
    return problem(what + " bias", std::to_string(ref.rows) + " values",
                   std::to_string(bias.size()));
  });
  std::memcpy(place->memory + expert * ref.expert_stride, rows.data(), rows.size());
  place->scales[e] = scale;
  if (!bias.empty()) {
    const auto width = static_cast<std::size_t>(ref.rows);
    place->biases.resize(place->seen.size() * width);
    std::ranges::copy(bias, place->biases.begin() + static_cast<std::ptrdiff_t>(e * width));
    ++place->with_bias;
  }
  place->seen[e] = true;
}

RoleWeights Builder::take(Place& place, LoadReport& report) const {
  const std::string name = name_of(place.role);
  const auto missing = std::ranges::find(place.seen, false);
  require<ShapeError>(missing == place.seen.end(), [&] {
    return problem(name, "every expert",
                   "nothing for expert " + std::to_string(missing - place.seen.begin()));
  });
  require<ShapeError>(place.with_bias == 0 || place.with_bias == shape_.num_experts, [&] {
    return problem(name + " bias", "one for every expert or for none",
                   std::to_string(place.with_bias) + " of " + std::to_string(shape_.num_experts));
  });
  if (place.with_bias != 0) {
    place.weights.bias = std::make_shared<const std::vector<float>>(std::move(place.biases));
  }
  if (std::ranges::any_of(place.scales, [](float scale) { return scale != 1.0F; })) {
    place.weights.scale = std::make_shared<const std::vector<float>>(std::move(place.scales));
  }
  record(report, place.role, place.weights, std::move(place.spec.source),
         std::move(place.spec.decision), std::move(place.spec.reason));
  return std::move(place.weights);
}

ExpertStack Builder::build(const LoadOptions& options) && {
  std::vector<Place> places = std::exchange(places_, {});
  require<ShapeError>(!places.empty(), [] { return problem("build", "one call", "another"); });
  ExpertStack::Parts parts;
  parts.shape = shape_;
  for (Place& place : places) {
    RoleWeights& to = place.role == Role::Gate ? parts.gate
                      : place.role == Role::Up ? parts.up
                                               : parts.down;
    to = take(place, parts.report);
  }
  return finish(std::move(parts), options, start_);
}

}  // namespace moesaic::stack
