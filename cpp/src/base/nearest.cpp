#include "base/nearest.hpp"

#include <algorithm>
#include <cctype>
#include <numeric>
#include <utility>
#include <vector>

namespace moesaic {
namespace {

constexpr std::size_t kLongestWord = 40;

std::string lower_case(std::string_view text) {
  std::string lower(text);
  std::ranges::transform(lower, lower.begin(), [](unsigned char c) { return std::tolower(c); });
  return lower;
}

/// An element type of numpy, torch or C as this library spells it; other words as they are.
std::string plain_type(std::string_view text) {
  if (const auto dot = text.rfind('.'); dot != std::string_view::npos) text.remove_prefix(dot + 1);
  constexpr std::pair<std::string_view, std::string_view> kStems[] = {
      {"bfloat", "bf"}, {"float", "f"}, {"fp", "f"}, {"uint", "u"}, {"int", "i"}};
  if (text == "half") return "f16";
  if (text == "double") return "f64";
  if (text == "float") return "f32";
  for (const auto& [stem, ours] : kStems) {
    if (text.starts_with(stem)) return std::string(ours) + std::string(text.substr(stem.size()));
  }
  return std::string(text);
}

/// How unlike two words are. One that begins with the other counts as alike, and one that holds the
/// other as half of it or more: "out" is in "return_router" by chance.
std::size_t distance(std::string_view text, std::string_view word) {
  const std::string_view part = text.size() < word.size() ? text : word;
  const std::string_view whole = text.size() < word.size() ? word : text;
  const bool held = whole.find(part) != std::string_view::npos;
  const bool alike = whole.starts_with(part) || (held && 2 * part.size() >= whole.size());
  return part.size() >= 3 && alike ? 1 : edit_distance(text, word);
}

}  // namespace

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replace = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replace, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

std::string_view nearest_word(std::string_view text, std::span<const std::string_view> words) {
  // The distance takes the product of the lengths; nobody misspells a word as a page.
  if (text.empty() || text.size() > kLongestWord) return {};
  const std::string lower = lower_case(text), type = plain_type(lower);
  std::string_view best;
  std::size_t least = text.size() <= 2 ? 1 : std::max<std::size_t>(2, text.size() / 2);
  for (const std::string_view word : words) {
    const std::string candidate = lower_case(word);
    if (candidate == lower || candidate == type) return word;
    const std::size_t here = distance(lower, candidate);
    if (here < least || (here == least && best.empty() && here < candidate.size())) {
      least = here;
      best = word;
    }
  }
  return best;
}

std::string nearest_hint(std::string_view text, std::span<const std::string_view> words) {
  const std::string_view word = nearest_word(text, words);
  return word.empty() ? std::string() : "nearest: " + std::string(word);
}

std::string quoted_word(std::string_view text) {
  if (text.size() <= kLongestWord) return "'" + std::string(text) + "'";
  // A cut inside of a character of UTF-8 would leave half of it.
  std::size_t end = kLongestWord;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return "'" + std::string(text.substr(0, end)) + "...'";
}

}  // namespace moesaic
