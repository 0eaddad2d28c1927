#include "moesaic/tuning.hpp"

#include <algorithm>
#include <cstddef>
#include <memory>

#include "base/env.hpp"
#include "base/nearest.hpp"
#include "moesaic/error.hpp"

#if defined(_WIN32)
#include <stdlib.h>
#else
extern char** environ;
#endif

namespace moesaic {
namespace {

constexpr std::string_view kPrefix = "MOESAIC_";
constexpr std::int32_t kMaxThreads = 4096;
constexpr std::int32_t kMaxNodes = 64;

template <std::string_view Knob::* Field>
std::string_view nearest(std::string_view name) {
  const auto known = knobs();
  const auto best = std::ranges::min_element(
      known, {}, [name](const Knob& knob) { return edit_distance(name, knob.*Field); });
  return (*best).*Field;
}

[[noreturn]] void reject(std::string_view operation, const Knob& knob, std::string_view what,
                         std::string_view value) {
  throw ConfigError(Problem{std::string(operation), std::string(what), std::string(knob.accepted),
                            "\"" + std::string(value) + "\"", ""});
}

using Variables = std::vector<std::pair<std::string, std::string>>;

/// The MOESAIC_* part of the process environment.
Variables read_environment() {
#if defined(_WIN32)
  char** at = _environ;
#else
  char** at = environ;
#endif
  Variables found;
  for (; at != nullptr && *at != nullptr; ++at) {
    const std::string_view entry = *at;
    const std::size_t equals = entry.find('=');
    if (!entry.starts_with(kPrefix) || equals == std::string_view::npos) continue;
    found.emplace_back(entry.substr(0, equals), entry.substr(equals + 1));
  }
  return found;
}

struct ProcessTuning {
  Tuning tuning;
  std::vector<std::string> warnings;
};

const ProcessTuning& process_tuning() {
  // Never destroyed: where a process ends during a call, threads read on.
  static const ProcessTuning& process = *[] {
    auto read = std::make_unique<ProcessTuning>();
    read->tuning = Tuning::from_env(
        read_environment(), [&](const std::string& text) { read->warnings.push_back(text); });
    return read.release();
  }();
  return process;
}

}  // namespace

void Tuning::validate() const {
  const auto check_block = [](const std::optional<std::int32_t>& size, const char* name) {
    require<ConfigError>(
        !size || std::ranges::find(kBlockSizes, *size) != std::end(kBlockSizes),
        [&] { return Problem{"tuning", name, "8, 16, 32, 48 or 64", std::to_string(*size), ""}; });
  };
  check_block(block_size, "block_size");
  check_block(large_m_block_size, "large_m_block_size");
  require<ConfigError>(large_m_min_pairs >= 1, [&] {
    return Problem{"tuning", "large_m_min_pairs", "at least 1", std::to_string(large_m_min_pairs),
                   ""};
  });
  require<ConfigError>(!threads || (*threads >= 1 && *threads <= kMaxThreads), [&] {
    return Problem{"tuning", "threads", "1 to " + std::to_string(kMaxThreads),
                   std::to_string(*threads), ""};
  });
  require<ConfigError>(numa.count >= 0 && numa.count <= kMaxNodes, [&] {
    return Problem{"tuning", "numa", "0 (auto) to " + std::to_string(kMaxNodes),
                   std::to_string(numa.count), ""};
  });
}

Tuning Tuning::from_env(std::span<const std::pair<std::string, std::string>> variables,
                        const std::function<void(const std::string&)>& warn) {
  Tuning tuning;
  for (const auto& [variable, value] : variables) {
    if (!variable.starts_with(kPrefix)) continue;
    const auto known = knobs();
    const auto knob = std::ranges::find(known, variable, &Knob::variable);
    if (knob == known.end()) {
      if (warn) {
        warn("unknown environment variable " + variable +
             " (nearest: " + std::string(nearest<&Knob::variable>(variable)) + ")");
      }
      continue;
    }
    if (value.empty()) continue;  // `MOESAIC_X= command` unsets X in a shell
    if (!knob->set(tuning, value)) reject("environment", *knob, variable, value);
  }
  return tuning;
}

const Tuning& Tuning::process() { return process_tuning().tuning; }

std::span<const std::string> Tuning::process_warnings() { return process_tuning().warnings; }

std::vector<ConfigEntry> show_config(const Tuning& effective, const Tuning& environment) {
  const Tuning defaults;
  std::vector<ConfigEntry> entries;
  for (const Knob& knob : knobs()) {
    const std::string value = knob.get(effective);
    const std::string from_environment = knob.get(environment);
    const char* source = value != from_environment                ? "tuning"
                         : from_environment != knob.get(defaults) ? "environment"
                                                                  : "default";
    entries.push_back({std::string(knob.name), std::string(knob.variable), value, source,
                       std::string(knob.help) + " (" + std::string(knob.accepted) + ")"});
  }
  return entries;
}

void set_knob(Tuning& tuning, std::string_view knob, std::string_view value) {
  const Knob* found = find_knob(knob);
  require<ConfigError>(found != nullptr, [&] {
    return Problem{"tuning", std::string(knob), "a known knob", "",
                   "nearest: " + std::string(nearest<&Knob::name>(knob))};
  });
  if (!found->set(tuning, value)) reject("tuning", *found, knob, value);
}

}  // namespace moesaic
