#pragma once

/// The words of the knobs' values, for the environment and for Python.

#include <array>

#include "moesaic/tuning.hpp"

namespace moesaic {

/// Words of an enumeration; the enumerators count from 0 in this order.
template <class E>
struct Words;

template <>
struct Words<GemmMode> {
  static constexpr std::array text{"auto", "bucketed", "aligned"};
};
template <>
struct Words<RouteMode> {
  static constexpr std::array text{"auto", "host", "device"};
};
template <>
struct Words<RowSpaceMode> {
  static constexpr std::array text{"auto", "token_pairs", "packed_rows"};
};
template <>
struct Words<Precision> {
  static constexpr std::array text{"auto", "exact", "fast"};
};
template <>
struct Words<ProfileMode> {
  static constexpr std::array text{"off", "counters", "events", "sync"};
};
template <>
struct Words<LogLevel> {
  static constexpr std::array text{"off", "error", "warn", "info", "debug"};
};
template <>
struct Words<CpuIsa> {
  static constexpr std::array text{"auto", "scalar", "avx2", "avxvnni", "avx512vnni", "neon"};
};

}  // namespace moesaic
