#pragma once

/// Layers and batches as data. Parity tests, contract tests and the bench read the same list.

#include <cstdint>

#include "moesaic/config.hpp"
#include "moesaic/quant.hpp"

namespace moesaic::cases {

/// Which experts the tokens ask for.
enum class RoutingShape : std::uint8_t {
  Uniform,       ///< every expert as likely
  Zipf,          ///< a few experts get most tokens
  AllToOne,      ///< slot 0 always asks for the last expert
  EmptyExperts,  ///< the upper half is never asked for
  Skipped,       ///< uniform, with -1 mixed in; token 0 has nothing but -1
};

struct Case {
  const char* name;
  std::int64_t tokens, hidden, intermediate;
  std::int32_t experts, top_k;
  QuantType gate, up, down;
  RoutingShape routing = RoutingShape::Uniform;
  ActivationKind activation = ActivationKind::SwiGlu;
  bool epilogue = false;  ///< biases and per-expert scales
};

// clang-format off
inline constexpr Case kCases[] = {
    {"one_token",      1,   256, 512,   8, 2, QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K},
    {"two_tokens",     2,   256, 256,   8, 2, QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K},
    {"odd_sizes",      7,   160,  96,   5, 3, QuantType::Q4_0, QuantType::Q5_1, QuantType::Q8_0},
    {"wide_batch",    64,   256, 256,  16, 4, QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K},
    {"zipf",          33,   256, 256,  32, 4, QuantType::Q5_K, QuantType::Q3_K, QuantType::Q2_K, RoutingShape::Zipf},
    {"all_to_one",    40,   128,  64,   6, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_1, RoutingShape::AllToOne},
    {"empty_experts", 24,   128,  64,  12, 2, QuantType::IQ4_NL, QuantType::IQ4_NL, QuantType::MXFP4, RoutingShape::EmptyExperts},
    {"skipped",       19,   128,  64,   5, 3, QuantType::Q4_0, QuantType::Q4_0, QuantType::Q5_0, RoutingShape::Skipped},
    {"every_expert",   9,    64,  32,   4, 4, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0},
    {"one_expert",    17,    64,  96,   1, 1, QuantType::Q4_0, QuantType::Q4_0, QuantType::Q8_0},
    {"many_experts",   5,    32,  32, 512, 8, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0},
    {"dense_f32",      6,    30,  17,   5, 3, QuantType::F32, QuantType::F32, QuantType::F32},
    {"dense_16",       6,    48,  24,   5, 2, QuantType::F16, QuantType::BF16, QuantType::F16},
    {"epilogue_oai",  11,    96,  64,   5, 3, QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4, RoutingShape::Uniform, ActivationKind::SwiGluOai, true},
    {"ungated",       11,    64,  96,   5, 2, QuantType::F32, QuantType::Q8_0, QuantType::Q8_0, RoutingShape::Skipped, ActivationKind::ReluSquared, true},
    {"geglu",          3,   256, 256,   4, 2, QuantType::IQ4_XS, QuantType::Q6_K, QuantType::Q5_K, RoutingShape::Uniform, ActivationKind::GeGluTanh},
    {"no_tokens",      0,    64,  32,   4, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0},
};
// clang-format on

}  // namespace moesaic::cases
