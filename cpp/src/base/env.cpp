#include "base/env.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

#include "base/words.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

bool parse(std::string_view text, bool& out) {
  out = text == "1" || text == "true" || text == "on";
  return out || text == "0" || text == "false" || text == "off";
}

template <class E>
  requires std::is_enum_v<E>
bool parse(std::string_view text, E& out) {
  const auto& words = Words<E>::text;
  const auto at = std::ranges::find(words, text);
  if (at == words.end()) return false;
  out = static_cast<E>(at - words.begin());
  return true;
}

template <std::signed_integral I>
bool parse(std::string_view text, I& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc{} && end == text.data() + text.size();
}

template <class T>
bool parse(std::string_view text, std::optional<T>& out) {
  out.reset();
  return text == "auto" || parse(text, out.emplace());
}

/// Whether a name is a backend's is for the registry to say.
bool parse(std::string_view text, std::string& out) {
  out = text == "auto" ? "" : text;
  return !text.empty() && std::ranges::all_of(text, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
  });
}

bool parse(std::string_view text, std::filesystem::path& out) {
  out = text == "auto" ? "" : text;
  return !text.empty();
}

std::string show(bool value) { return value ? "on" : "off"; }
template <class E>
  requires std::is_enum_v<E>
std::string show(E value) {
  return Words<E>::text.at(static_cast<std::size_t>(value));
}
template <std::signed_integral I>
std::string show(I value) {
  return std::to_string(value);
}
template <class T>
std::string show(const std::optional<T>& value) {
  return value ? show(*value) : "auto";
}
std::string show(const std::string& value) { return value.empty() ? "auto" : value; }
std::string show(const std::filesystem::path& value) { return show(value.string()); }

template <auto Member>
bool set(Tuning& tuning, std::string_view text) {
  Tuning changed = tuning;
  if (!parse(text, changed.*Member)) return false;
  try {
    changed.validate();
  } catch (const ConfigError&) {
    return false;
  }
  tuning = std::move(changed);
  return true;
}

template <auto Member>
std::string get(const Tuning& tuning) {
  return show(tuning.*Member);
}

template <auto Member>
constexpr Knob knob(std::string_view name, std::string_view variable, std::string_view accepted,
                    std::string_view help) {
  return {name, variable, accepted, help, &set<Member>, &get<Member>};
}

constexpr std::string_view kSwitch = "0|1|true|false|on|off";
constexpr std::string_view kBlock = "auto|8|16|32|48|64";

constexpr Knob kKnobs[] = {
    knob<&Tuning::log>("log", "MOESAIC_LOG", "off|error|warn|info|debug",
                       "least severe message that reaches the log"),
    knob<&Tuning::profile>("profile", "MOESAIC_PROFILE", "off|counters|events|sync",
                           "zone totals and counters; events keeps a trace; sync waits for the "
                           "device at each zone"),
    knob<&Tuning::backend>("backend", "MOESAIC_BACKEND", "auto|cpu|cuda|metal",
                           "backend to use; auto: that of the device asked for"),
    knob<&Tuning::cuda_plugin>("cuda_plugin", "MOESAIC_CUDA_PLUGIN", "auto, or a path",
                               "the CUDA plug-in, read once per process; auto: the one installed "
                               "beside the library"),
    knob<&Tuning::cpu_isa>("cpu_isa", "MOESAIC_CPU_ISA", "auto|scalar|avx2|avxvnni|avx512vnni|neon",
                           "instruction set of the CPU kernels; auto: the best one present"),
    knob<&Tuning::threads>("threads", "MOESAIC_THREADS", "auto|1..4096",
                           "threads of the CPU backend; auto: the CPUs this process may use"),
    knob<&Tuning::gemm>("gemm", "MOESAIC_GEMM", "auto|bucketed|aligned",
                        "grouped GEMM over buckets or over aligned blocks"),
    knob<&Tuning::route>("route", "MOESAIC_ROUTE", "auto|host|device",
                         "where a layer routes: auto, on its own device; host costs a wait for the "
                         "logits; device is an error on the CPU"),
    knob<&Tuning::row_space>("row_space", "MOESAIC_ROW_SPACE", "auto|token_pairs|packed_rows",
                             "rows of the grouped GEMM: pairs in place, or gathered"),
    knob<&Tuning::precision>("precision", "MOESAIC_PRECISION", "auto|exact|fast",
                             "activations against quantised weights: two int8 planes or one"),
    knob<&Tuning::batch_invariant>("batch_invariant", "MOESAIC_BATCH_INVARIANT", kSwitch,
                                   "a token's result does not depend on its batch"),
    knob<&Tuning::block_size>("block_size", "MOESAIC_BLOCK_SIZE", kBlock,
                              "rows per block of the aligned GEMM"),
    knob<&Tuning::large_m_block_size>(
        "large_m_block_size", "MOESAIC_LARGE_M_BLOCK_SIZE", kBlock,
        "block_size of a layer on a device from large_m_min_pairs on"),
    knob<&Tuning::large_m_min_pairs>("large_m_min_pairs", "MOESAIC_LARGE_M_MIN_PAIRS",
                                     "an integer, at least 1",
                                     "pairs from which large_m_block_size holds"),
    knob<&Tuning::strict>("strict", "MOESAIC_STRICT", kSwitch,
                          "recorded decisions (fallbacks, non-finite rows) become errors"),
    knob<&Tuning::poison>("poison", "MOESAIC_POISON", kSwitch,
                          "fill workspaces with NaN before each call"),
};

}  // namespace

std::span<const Knob> knobs() noexcept { return kKnobs; }

const Knob* find_knob(std::string_view name) noexcept {
  const auto* at = std::ranges::find(kKnobs, name, &Knob::name);
  return at == std::end(kKnobs) ? nullptr : at;
}

}  // namespace moesaic
