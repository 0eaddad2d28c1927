#pragma once

/// INT4 roles for tests, from random GPTQ tensors.

#include <cmath>

#include "layers.hpp"
#include "moesaic/marlin_stack.hpp"

namespace moesaic::testing {

struct Int4Recipe {
  std::int64_t group_size = 128;  ///< -1: per channel
  bool zeros = false;
  bool scale_f32 = false;
  enum Order { Plain, Shared, PerExpert } order = Plain;  ///< of columns: act-order
};

inline TestRole make_int4_role(std::int32_t experts, std::int64_t rows, std::int64_t cols,
                               const Int4Recipe& recipe, std::uint32_t seed, bool epilogue) {
  Random random(seed);
  const std::int64_t group = recipe.group_size < 0 ? cols : recipe.group_size;
  const std::int64_t groups = (cols + group - 1) / group;
  std::vector<std::uint32_t> codes(static_cast<std::size_t>(experts * (cols / 8) * rows));
  for (auto& word : codes) word = random.bits();
  std::vector<std::uint32_t> zeros(
      static_cast<std::size_t>(recipe.zeros ? experts * groups * ((rows + 7) / 8) : 0));
  for (auto& word : zeros) word = random.bits();
  Floats scales =
      random_values(experts * groups * rows, seed + 1, 0.2F / std::sqrt(static_cast<float>(cols)));
  std::vector<std::uint16_t> halves;
  for (const float s : scales) halves.push_back(f32_to_f16(s));
  std::vector<std::int32_t> g_idx;
  Random shuffler(5);  // so that roles of one width have one order
  if (recipe.order != Int4Recipe::Plain) {
    for (std::int32_t e = 0; e < (recipe.order == Int4Recipe::Shared ? 1 : experts); ++e) {
      std::vector<std::int32_t> order(static_cast<std::size_t>(cols));
      for (std::int64_t i = 0; i < cols; ++i) {
        order[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i / group);
      }
      shuffler.shuffle(order);
      g_idx.insert(g_idx.end(), order.begin(), order.end());
    }
  }

  GptqTensors t;
  t.qweight = ConstTensorView(codes.data(), DType::I32, {experts, cols / 8, rows});
  t.scales = recipe.scale_f32 ? ConstTensorView(scales.data(), DType::F32, {experts, groups, rows})
                              : ConstTensorView(halves.data(), DType::F16, {experts, groups, rows});
  if (recipe.zeros) {
    t.qzeros = ConstTensorView(zeros.data(), DType::I32, {experts, groups, (rows + 7) / 8});
  }
  if (recipe.order == Int4Recipe::Shared) {
    t.g_idx = ConstTensorView(g_idx.data(), DType::I32, {cols});
  } else if (recipe.order == Int4Recipe::PerExpert) {
    t.g_idx = ConstTensorView(g_idx.data(), DType::I32, {experts, cols});
  }
  t.group_size = recipe.group_size;
  const auto stack = std::make_shared<MarlinExpertStack>(MarlinExpertStack::from_gptq(t));

  TestRole role;
  role.weights = stack->weights();
  role.weights.owner = stack;
  role.decoded = decode_role(role.weights);
  if (epilogue) add_epilogue(role, seed);
  return role;
}

}  // namespace moesaic::testing
