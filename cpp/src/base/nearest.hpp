#pragma once

/// The word that was most likely meant, for the hints of messages.

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace moesaic {

/// Insertions, deletions and replacements that turn `a` into `b`.
std::size_t edit_distance(std::string_view a, std::string_view b);

/// The one of `words` that `text` most likely stands for; empty when none is close. Another case is
/// close, and so are element types as other packages spell them ("torch.float32" for f32).
std::string_view nearest_word(std::string_view text, std::span<const std::string_view> words);

/// "nearest: WORD", or nothing when none is close.
std::string nearest_hint(std::string_view text, std::span<const std::string_view> words);

/// 'text', cut where it would be too long for a message.
std::string quoted_word(std::string_view text);

}  // namespace moesaic
