/// The one table that spells enumerators (moesaic/names.hpp). It stands apart from the enumerations
/// so that no second spelling grows beside one of them; a new enumerator needs a word here, which
/// names_test checks.

#include "moesaic/names.hpp"

#include <array>
#include <utility>
#include <vector>

#include "base/nearest.hpp"
#include "model/model.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/config.hpp"
#include "moesaic/expert_pool.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/marlin_stack.hpp"
#include "moesaic/offload.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/profile.hpp"
#include "moesaic/routing.hpp"
#include "moesaic/tuning.hpp"
#include "moesaic/types.hpp"

namespace moesaic {
namespace {

/// The words of rows {enumerator, word}. Does not compile unless the enumerators count from 0.
template <class E, std::size_t N>
consteval std::array<const char*, N> spell(const std::pair<E, const char*> (&rows)[N]) {
  std::array<const char*, N> words{};
  for (std::size_t i = 0; i < N; ++i) {
    if (static_cast<std::size_t>(rows[i].first) != i) throw "rows out of order";
    words[i] = rows[i].second;
  }
  return words;
}

template <class E>
constexpr int kWords = 0;

// Elements and devices.

template <>
constexpr auto kWords<DType> = spell<DType>({{DType::F32, "f32"},
                                             {DType::F16, "f16"},
                                             {DType::BF16, "bf16"},
                                             {DType::F64, "f64"},
                                             {DType::I32, "i32"},
                                             {DType::I64, "i64"},
                                             {DType::U8, "u8"},
                                             {DType::U16, "u16"},
                                             {DType::Bool, "bool"}});
template <>
constexpr auto kWords<DeviceType> = spell<DeviceType>(
    {{DeviceType::Cpu, "cpu"}, {DeviceType::Cuda, "cuda"}, {DeviceType::Metal, "metal"}});
template <>
constexpr auto kWords<GgufType> = spell<GgufType>({{GgufType::U8, "u8"},
                                                   {GgufType::I8, "i8"},
                                                   {GgufType::U16, "u16"},
                                                   {GgufType::I16, "i16"},
                                                   {GgufType::U32, "u32"},
                                                   {GgufType::I32, "i32"},
                                                   {GgufType::F32, "f32"},
                                                   {GgufType::Bool, "bool"},
                                                   {GgufType::String, "string"},
                                                   {GgufType::Array, "array"},
                                                   {GgufType::U64, "u64"},
                                                   {GgufType::I64, "i64"},
                                                   {GgufType::F64, "f64"}});

// Routers and layers.

template <>
constexpr auto kWords<ScoreFunction> =
    spell<ScoreFunction>({{ScoreFunction::Softmax, "softmax"},
                          {ScoreFunction::SoftmaxSelected, "softmax_selected"},
                          {ScoreFunction::Sigmoid, "sigmoid"},
                          {ScoreFunction::SqrtSoftplus, "sqrt_softplus"}});
template <>
constexpr auto kWords<SelectOn> = spell<SelectOn>(
    {{SelectOn::Scores, "scores"}, {SelectOn::Logits, "logits"}, {SelectOn::Given, "given"}});
template <>
constexpr auto kWords<GroupReduce> =
    spell<GroupReduce>({{GroupReduce::Top2Sum, "top2_sum"}, {GroupReduce::Max, "max"}});
template <>
constexpr auto kWords<GroupMask> =
    spell<GroupMask>({{GroupMask::MinusInfinity, "minus_infinity"}, {GroupMask::Zero, "zero"}});
template <>
constexpr auto kWords<NormGuard> = spell<NormGuard>({{NormGuard::None, "none"},
                                                     {NormGuard::AddEps, "add_eps"},
                                                     {NormGuard::ClampMin, "clamp_min"}});
template <>
constexpr auto kWords<WeightOn> =
    spell<WeightOn>({{WeightOn::Output, "output"}, {WeightOn::Input, "input"}});
template <>
constexpr auto kWords<RouterInput> = spell<RouterInput>({{RouterInput::Experts, "experts"},
                                                         {RouterInput::Norm, "norm"},
                                                         {RouterInput::Separate, "separate"}});
template <>
constexpr auto kWords<ActivationKind> =
    spell<ActivationKind>({{ActivationKind::SwiGlu, "swiglu"},
                           {ActivationKind::SwiGluClampInput, "swiglu_clamp_input"},
                           {ActivationKind::SwiGluClampOutput, "swiglu_clamp_output"},
                           {ActivationKind::SwiGluOai, "swiglu_oai"},
                           {ActivationKind::GeGluTanh, "geglu_tanh"},
                           {ActivationKind::ReGlu, "reglu"},
                           {ActivationKind::GeluTanh, "gelu_tanh"},
                           {ActivationKind::ReluSquared, "relu_squared"},
                           {ActivationKind::SiTu, "situ"}});
template <>
constexpr auto kWords<SharedKind> =
    spell<SharedKind>({{SharedKind::None, "none"},
                       {SharedKind::Plain, "plain"},
                       {SharedKind::SigmoidGated, "sigmoid_gated"}});
template <>
constexpr auto kWords<LayerKind> = spell<LayerKind>(
    {{LayerKind::None, "none"}, {LayerKind::Dense, "dense"}, {LayerKind::Moe, "moe"}});
template <>
constexpr auto kWords<LayerPart> =
    spell<LayerPart>({{LayerPart::InputWeights, "weights on the experts' input"},
                      {LayerPart::IdentityExperts, "identity experts"},
                      {LayerPart::GivenIds, "given expert ids"},
                      {LayerPart::Norms, "norms of the layer"},
                      {LayerPart::LatentExperts, "latent experts"},
                      {LayerPart::LowRankDeltas, "low-rank deltas"}});

template <>
constexpr auto kWords<Use> = spell<Use>(
    {{Use::Ignored, "ignored"}, {Use::Optional, "optional"}, {Use::Required, "required"}});

// Weights.

template <>
constexpr auto kWords<Role> =
    spell<Role>({{Role::Gate, "gate"}, {Role::Up, "up"}, {Role::Down, "down"}});
template <>
constexpr auto kWords<WeightLayout> =
    spell<WeightLayout>({{WeightLayout::Rows, "rows"},
                         {WeightLayout::Panels, "panels"},
                         {WeightLayout::CudaUnits, "cuda_units"}});
template <>
constexpr auto kWords<StackLayout> =
    spell<StackLayout>({{StackLayout::Auto, "auto"}, {StackLayout::File, "file"}});
template <>
constexpr auto kWords<CheckpointFormat> =
    spell<CheckpointFormat>({{CheckpointFormat::Gptq, "gptq"},
                             {CheckpointFormat::GptqV2, "gptq_v2"},
                             {CheckpointFormat::Awq, "awq"},
                             {CheckpointFormat::PackQuantized, "pack_quantized"}});

// Calls and their profile.

template <>
constexpr auto kWords<Path> =
    spell<Path>({{Path::Gemv, "gemv"}, {Path::Bucketed, "bucketed"}, {Path::Aligned, "aligned"}});
template <>
constexpr auto kWords<RowSpace> =
    spell<RowSpace>({{RowSpace::TokenPairs, "token_pairs"}, {RowSpace::PackedRows, "packed_rows"}});
template <>
constexpr auto kWords<Zone> = spell<Zone>({{Zone::Sync, "sync"},
                                           {Zone::Router, "router"},
                                           {Zone::Download, "download"},
                                           {Zone::Route, "route"},
                                           {Zone::Plan, "plan"},
                                           {Zone::Align, "align"},
                                           {Zone::Gather, "gather"},
                                           {Zone::GateUp, "gate_up"},
                                           {Zone::Activate, "activate"},
                                           {Zone::Down, "down"},
                                           {Zone::Combine, "combine"},
                                           {Zone::Shared, "shared"},
                                           {Zone::Upload, "upload"}});
template <>
constexpr auto kWords<Counter> = spell<Counter>({{Counter::Calls, "calls"},
                                                 {Counter::Tokens, "tokens"},
                                                 {Counter::Pairs, "pairs"},
                                                 {Counter::PaddedRows, "padded_rows"},
                                                 {Counter::ExpertsTouched, "experts_touched"},
                                                 {Counter::WeightBytes, "weight_bytes"},
                                                 {Counter::NonfiniteRows, "nonfinite_rows"}});

// Knobs.

template <>
constexpr auto kWords<GemmMode> = spell<GemmMode>(
    {{GemmMode::Auto, "auto"}, {GemmMode::Bucketed, "bucketed"}, {GemmMode::Aligned, "aligned"}});
template <>
constexpr auto kWords<RouteMode> = spell<RouteMode>(
    {{RouteMode::Auto, "auto"}, {RouteMode::Host, "host"}, {RouteMode::Device, "device"}});
template <>
constexpr auto kWords<RowSpaceMode> =
    spell<RowSpaceMode>({{RowSpaceMode::Auto, "auto"},
                         {RowSpaceMode::TokenPairs, "token_pairs"},
                         {RowSpaceMode::PackedRows, "packed_rows"}});
template <>
constexpr auto kWords<Precision> = spell<Precision>(
    {{Precision::Auto, "auto"}, {Precision::Exact, "exact"}, {Precision::Fast, "fast"}});
template <>
constexpr auto kWords<ProfileMode> = spell<ProfileMode>({{ProfileMode::Off, "off"},
                                                         {ProfileMode::Counters, "counters"},
                                                         {ProfileMode::Events, "events"},
                                                         {ProfileMode::Sync, "sync"}});
template <>
constexpr auto kWords<LogLevel> = spell<LogLevel>({{LogLevel::Off, "off"},
                                                   {LogLevel::Error, "error"},
                                                   {LogLevel::Warn, "warn"},
                                                   {LogLevel::Info, "info"},
                                                   {LogLevel::Debug, "debug"}});
template <>
constexpr auto kWords<CpuIsa> = spell<CpuIsa>({{CpuIsa::Auto, "auto"},
                                               {CpuIsa::Scalar, "scalar"},
                                               {CpuIsa::Avx2, "avx2"},
                                               {CpuIsa::AvxVnni, "avxvnni"},
                                               {CpuIsa::Avx512Vnni, "avx512vnni"},
                                               {CpuIsa::Amx, "amx"},
                                               {CpuIsa::Neon, "neon"}});

// The expert store.

template <>
constexpr auto kWords<Ranking> = spell<Ranking>(
    {{Ranking::Hits, "hits"}, {Ranking::Recency, "recency"}, {Ranking::Fixed, "fixed"}});
template <>
constexpr auto kWords<ExecMode> =
    spell<ExecMode>({{ExecMode::Reuse, "reuse"}, {ExecMode::Refresh, "refresh"}});
template <>
constexpr auto kWords<RefreshPolicy::Every> =
    spell<RefreshPolicy::Every>({{RefreshPolicy::Every::Forward, "forward"},
                                 {RefreshPolicy::Every::DecodeSteps, "decode_steps"},
                                 {RefreshPolicy::Every::Steps, "steps"},
                                 {RefreshPolicy::Every::Manual, "manual"}});
template <>
constexpr auto kWords<OnMiss> = spell<OnMiss>(
    {{OnMiss::Compute, "compute"}, {OnMiss::Stage, "stage"}, {OnMiss::Error, "error"}});

}  // namespace

template <class E>
std::span<const char* const> names_of() noexcept {
  return kWords<E>;
}

template std::span<const char* const> names_of<DType>() noexcept;
template std::span<const char* const> names_of<DeviceType>() noexcept;
template std::span<const char* const> names_of<GgufType>() noexcept;
template std::span<const char* const> names_of<ScoreFunction>() noexcept;
template std::span<const char* const> names_of<SelectOn>() noexcept;
template std::span<const char* const> names_of<GroupReduce>() noexcept;
template std::span<const char* const> names_of<GroupMask>() noexcept;
template std::span<const char* const> names_of<NormGuard>() noexcept;
template std::span<const char* const> names_of<WeightOn>() noexcept;
template std::span<const char* const> names_of<RouterInput>() noexcept;
template std::span<const char* const> names_of<ActivationKind>() noexcept;
template std::span<const char* const> names_of<SharedKind>() noexcept;
template std::span<const char* const> names_of<LayerKind>() noexcept;
template std::span<const char* const> names_of<LayerPart>() noexcept;
template std::span<const char* const> names_of<Use>() noexcept;
template std::span<const char* const> names_of<Role>() noexcept;
template std::span<const char* const> names_of<WeightLayout>() noexcept;
template std::span<const char* const> names_of<StackLayout>() noexcept;
template std::span<const char* const> names_of<CheckpointFormat>() noexcept;
template std::span<const char* const> names_of<Path>() noexcept;
template std::span<const char* const> names_of<RowSpace>() noexcept;
template std::span<const char* const> names_of<Zone>() noexcept;
template std::span<const char* const> names_of<Counter>() noexcept;
template std::span<const char* const> names_of<GemmMode>() noexcept;
template std::span<const char* const> names_of<RouteMode>() noexcept;
template std::span<const char* const> names_of<RowSpaceMode>() noexcept;
template std::span<const char* const> names_of<Precision>() noexcept;
template std::span<const char* const> names_of<ProfileMode>() noexcept;
template std::span<const char* const> names_of<LogLevel>() noexcept;
template std::span<const char* const> names_of<CpuIsa>() noexcept;
template std::span<const char* const> names_of<Ranking>() noexcept;
template std::span<const char* const> names_of<ExecMode>() noexcept;
template std::span<const char* const> names_of<RefreshPolicy::Every>() noexcept;
template std::span<const char* const> names_of<OnMiss>() noexcept;

void reject_word(std::string_view text, std::span<const char* const> words, const char* operation,
                 const char* what) {
  std::string expected;
  for (const char* word : words) expected += (expected.empty() ? "" : " | ") + std::string(word);
  const std::vector<std::string_view> known(words.begin(), words.end());
  throw ConfigError(
      Problem{operation, what, expected, quoted_word(text), nearest_hint(text, known)});
}

}  // namespace moesaic
