#include "base/env.hpp"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

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
  const std::optional<E> value = find_name<E>(text);
  if (value) out = *value;
  return value.has_value();
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

/// A 0 is no number of nodes; auto is a word.
bool parse(std::string_view text, NumaNodes& out) {
  if (text == "auto" || text == "off") {
    out.count = text == "off" ? 1 : 0;
    return true;
  }
  return parse(text, out.count) && out.count > 0;
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
  return name_of(value);
}
template <std::signed_integral I>
std::string show(I value) {
  return std::to_string(value);
}
template <class T>
std::string show(const std::optional<T>& value) {
  return value ? show(*value) : "auto";
}
std::string show(NumaNodes value) {
  return value.count == 0 ? "auto" : value.count == 1 ? "off" : std::to_string(value.count);
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
Knob knob(std::string_view name, std::string_view variable, std::string accepted,
          std::string_view help) {
  return {name, variable, std::move(accepted), help, &set<Member>, &get<Member>};
}

/// A knob whose values are the words of an enumeration.
template <auto Member>
Knob knob(std::string_view name, std::string_view variable, std::string_view help) {
  using Value = std::remove_cvref_t<decltype(std::declval<Tuning>().*Member)>;
  return knob<Member>(name, variable, list_names<Value>(), help);
}

constexpr const char* kSwitch = "0|1|true|false|on|off";
constexpr const char* kBlock = "auto|8|16|32|48|64";

std::vector<Knob> make_knobs() {
  return {
      knob<&Tuning::log>("log", "MOESAIC_LOG", "least severe message that reaches the log"),
      knob<&Tuning::profile>("profile", "MOESAIC_PROFILE",
                             "zone totals and counters; events keeps a trace; sync waits for the "
                             "device at each zone"),
      knob<&Tuning::backend>("backend", "MOESAIC_BACKEND", "auto|" + list_names<DeviceType>(),
                             "backend to use; auto: that of the device asked for"),
      knob<&Tuning::cuda_plugin>("cuda_plugin", "MOESAIC_CUDA_PLUGIN", "auto, or a path",
                                 "the CUDA plug-in, read once per process; auto: the one installed "
                                 "beside the library"),
      knob<&Tuning::cpu_isa>("cpu_isa", "MOESAIC_CPU_ISA",
                             "instruction set of the CPU kernels; auto: the best one present"),
      knob<&Tuning::threads>("threads", "MOESAIC_THREADS", "auto|1..4096",
                             "threads of the CPU backend; auto: one for each core that this "
                             "process may use"),
      knob<&Tuning::numa>("numa", "MOESAIC_NUMA", "auto|off|1..64",
                          "memory nodes that rows of weights are dealt to; auto: those of the "
                          "machine; a number it does not have: groups of CPUs"),
      knob<&Tuning::gemm>("gemm", "MOESAIC_GEMM",
                          "grouped GEMM over buckets or over aligned blocks"),
      knob<&Tuning::route>(
          "route", "MOESAIC_ROUTE",
          "where a layer routes: auto, on its own device; host costs a wait for the "
          "logits; device is an error on the CPU"),
      knob<&Tuning::row_space>("row_space", "MOESAIC_ROW_SPACE",
                               "rows of the grouped GEMM: pairs in place, or gathered"),
      knob<&Tuning::precision>("precision", "MOESAIC_PRECISION",
                               "activations against quantised weights: two int8 planes or one"),
      knob<&Tuning::batch_invariant>("batch_invariant", "MOESAIC_BATCH_INVARIANT", kSwitch,
                                     "a token's result does not depend on its batch"),
      knob<&Tuning::block_size>("block_size", "MOESAIC_BLOCK_SIZE", kBlock,
                                "rows per block of the aligned GEMM"),
      knob<&Tuning::large_m_block_size>(
          "large_m_block_size", "MOESAIC_LARGE_M_BLOCK_SIZE", kBlock,
          "rows per block on a device from large_m_min_pairs pairs on"),
      knob<&Tuning::large_m_min_pairs>("large_m_min_pairs", "MOESAIC_LARGE_M_MIN_PAIRS",
                                       "an integer, at least 1",
                                       "pairs from which large_m_block_size holds"),
      knob<&Tuning::strict>("strict", "MOESAIC_STRICT", kSwitch,
                            "recorded decisions (fallbacks, non-finite rows) become errors"),
      knob<&Tuning::poison>("poison", "MOESAIC_POISON", kSwitch,
                            "fill workspaces with NaN before each call"),
  };
}

}  // namespace

std::span<const Knob> knobs() {
  // Never destroyed: where a process ends during a call, threads read on.
  static const auto& table = *new std::vector<Knob>(make_knobs());
  return table;
}

const Knob* find_knob(std::string_view name) {
  const auto table = knobs();
  const auto at = std::ranges::find(table, name, &Knob::name);
  return at == table.end() ? nullptr : &*at;
}

}  // namespace moesaic
