#pragma once

/// Knobs. A value in a call wins over the tuning() context, that over the environment, that over
/// the default. One table (base/env.cpp) lists every knob with its MOESAIC_* variable, parser and
/// help text. An unknown name in the environment warns once, a bad value throws.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moesaic/plan.hpp"

namespace moesaic {

enum class GemmMode : std::uint8_t { Auto, Bucketed, Aligned };
enum class RouteMode : std::uint8_t { Auto, Host, Device };
enum class RowSpaceMode : std::uint8_t { Auto, TokenPairs, PackedRows };
enum class ProfileMode : std::uint8_t { Off, Counters, Events, Sync };
enum class LogLevel : std::uint8_t { Off, Error, Warn, Info, Debug };
enum class CpuIsa : std::uint8_t { Auto, Scalar, Avx2, AvxVnni, Avx512Vnni, Amx, Neon };

/// How many NUMA nodes the CPU backend tells apart.
struct NumaNodes {
  std::int32_t count = 0;  ///< 0: those of the machine (auto), 1: none (off), or so many

  bool operator==(const NumaNodes&) const = default;
};

struct Tuning {
  std::optional<std::int32_t> block_size;          ///< 8, 16, 32, 48, 64
  std::optional<std::int32_t> large_m_block_size;  ///< where the counts lie on a device
  std::int64_t large_m_min_pairs = 1024;
  GemmMode gemm = GemmMode::Auto;
  /// Where the routing of a layer runs. Auto: on its own device. Host: there, also for a layer on
  /// a device, whose logits the call then waits for. Device: a ConfigError on the CPU.
  RouteMode route = RouteMode::Auto;
  RowSpaceMode row_space = RowSpaceMode::Auto;
  Precision precision = Precision::Auto;
  bool batch_invariant = false;  ///< a token's result does not depend on its batch
  ProfileMode profile = ProfileMode::Off;
  bool strict = false;  ///< recorded decisions (fallbacks, non-finite rows) become errors
  std::optional<std::int32_t> threads;  ///< unset: default_threads()
  NumaNodes numa;                 ///< at load: where panels lie; in a call: whose threads run which
  CpuIsa cpu_isa = CpuIsa::Auto;  ///< Auto: MOESAIC_CPU_ISA, else the best one here
  std::string backend;            ///< empty: chosen by the device asked for
  /// The CUDA plug-in; empty: beside this library. Read from the environment alone, when the
  /// backends are first asked for.
  std::filesystem::path cuda_plugin;
  LogLevel log = LogLevel::Warn;  ///< of the Python logger; read from the environment alone
  bool poison = false;            ///< fill workspaces with NaN before each call

  bool operator==(const Tuning&) const = default;

  /// Throws ConfigError on a value out of range.
  void validate() const;
  /// Reads MOESAIC_* names from `variables`. Throws ConfigError naming the variable, the accepted
  /// values and the one given; unknown MOESAIC_* names are reported to `warn` with the nearest
  /// match.
  static Tuning from_env(std::span<const std::pair<std::string, std::string>> variables,
                         const std::function<void(const std::string&)>& warn);
  /// from_env of the process environment, read once at first use.
  static const Tuning& process();
  /// What that reading warned about; the library itself prints nothing.
  static std::span<const std::string> process_warnings();
};

/// One knob as show_config() lists it, its value as text that set_knob() accepts.
struct ConfigEntry {
  std::string knob, variable, value, source, help;
};
/// Every knob with its effective value and where it came from ("default", "environment", "tuning").
std::vector<ConfigEntry> show_config(const Tuning& effective, const Tuning& environment);

/// Sets one knob from text, as the environment and Python do. Throws ConfigError.
void set_knob(Tuning& tuning, std::string_view knob, std::string_view value);

}  // namespace moesaic
