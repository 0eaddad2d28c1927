#pragma once

/// The words that stand for enumerators in Python. Enumerators count from 0 in this order.

#include <algorithm>
#include <array>
#include <string>
#include <string_view>

#include "base/words.hpp"
#include "moesaic/config.hpp"
#include "moesaic/error.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/plan.hpp"

namespace moesaic {

template <>
struct Words<ScoreFunction> {
  static constexpr std::array text{"softmax", "softmax_selected", "sigmoid", "sqrt_softplus"};
};
template <>
struct Words<GroupReduce> {
  static constexpr std::array text{"top2_sum", "max"};
};
template <>
struct Words<GroupMask> {
  static constexpr std::array text{"minus_infinity", "zero"};
};
template <>
struct Words<NormGuard> {
  static constexpr std::array text{"none", "add_eps", "clamp_min"};
};
template <>
struct Words<WeightOn> {
  static constexpr std::array text{"output", "input"};
};
template <>
struct Words<SelectOn> {
  static constexpr std::array text{"scores", "logits", "given"};
};
template <>
struct Words<RouterInput> {
  static constexpr std::array text{"experts", "norm", "separate"};
};
template <>
struct Words<LayerKind> {
  static constexpr std::array text{"none", "dense", "moe"};
};
template <>
struct Words<SharedKind> {
  static constexpr std::array text{"none", "plain", "sigmoid_gated"};
};
template <>
struct Words<RowSpace> {
  static constexpr std::array text{"token_pairs", "packed_rows"};
};
template <>
struct Words<StackLayout> {
  static constexpr std::array text{"auto", "file"};
};
template <>
struct Words<WeightLayout> {
  static constexpr std::array text{"rows", "panels", "cuda_units"};
};
template <>
struct Words<Role> {
  static constexpr std::array text{"gate", "up", "down"};
};

}  // namespace moesaic

namespace moesaic::python {

template <class E>
const char* word_of(E value) {
  return Words<E>::text.at(static_cast<std::size_t>(value));
}

/// Throws ConfigError with the accepted words.
template <class E>
E parse_word(std::string_view text, const char* operation, const char* name) {
  const auto& words = Words<E>::text;
  const auto at = std::ranges::find(words, text);
  require<ConfigError>(at != words.end(), [&] {
    std::string accepted;
    for (const char* word : words) accepted += (accepted.empty() ? "" : " | ") + std::string(word);
    return Problem{operation, name, accepted, "'" + std::string(text) + "'", {}};
  });
  return static_cast<E>(at - words.begin());
}

}  // namespace moesaic::python
