#pragma once

/// The spelling of enumerators. One table (cpp/src/base/names.cpp) spells every enumeration that
/// the library names in words; messages, the environment, the bindings and the reports all read it,
/// so that a word which a report prints is a word which a call accepts.

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "moesaic/error.hpp"

namespace moesaic {

/// The words of an enumeration in the order of its enumerators, which count from 0. An enumerator
/// `Count` at the end stands for no value and has no word. Links for the enumerations of the table.
template <class E>
std::span<const char* const> names_of() noexcept;

/// The word of a value; "unknown" for a number that is no enumerator.
template <class E>
  requires std::is_enum_v<E>
const char* name_of(E value) noexcept {
  const std::span<const char* const> names = names_of<E>();
  const auto at = static_cast<std::size_t>(value);
  return at < names.size() ? names[at] : "unknown";
}

/// The value of a word; empty when the enumeration has no such word.
template <class E>
std::optional<E> find_name(std::string_view text) noexcept {
  const std::span<const char* const> names = names_of<E>();
  for (std::size_t at = 0; at < names.size(); ++at) {
    if (text == names[at]) return static_cast<E>(at);
  }
  return std::nullopt;
}

/// All words of an enumeration for a message or a help text, such as "auto|exact|fast".
template <class E>
std::string list_names(std::string_view separator = "|") {
  std::string text;
  for (const char* name : names_of<E>()) {
    if (!text.empty()) text += separator;
    text += name;
  }
  return text;
}

/// Throws ConfigError with the known words, and the one of them that `text` most likely stands for.
[[noreturn]] void reject_word(std::string_view text, std::span<const char* const> words,
                              const char* operation, const char* what);

/// The value of a word. Throws ConfigError with `operation`, `what` and the words that are known.
template <class E>
E parse_name(std::string_view text, const char* operation, const char* what) {
  const std::optional<E> value = find_name<E>(text);
  if (!value) reject_word(text, names_of<E>(), operation, what);
  return *value;
}

}  // namespace moesaic
