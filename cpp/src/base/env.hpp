#pragma once

/// The table of knobs: one row is all there is to know about one.

#include <span>
#include <string>
#include <string_view>

#include "moesaic/tuning.hpp"

namespace moesaic {

struct Knob {
  std::string_view name;      ///< as in tuning() and show_config()
  std::string_view variable;  ///< environment variable
  std::string accepted;       ///< for messages and help
  std::string_view help;
  bool (*set)(Tuning& tuning, std::string_view text);  ///< false: text is not accepted
  std::string (*get)(const Tuning& tuning);  ///< text that `set` accepts; of Tuning{}: the default
};

std::span<const Knob> knobs();

/// Null when there is no such knob.
const Knob* find_knob(std::string_view name);

}  // namespace moesaic
