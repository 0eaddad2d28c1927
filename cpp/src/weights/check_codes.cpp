#include "weights/check_codes.hpp"

#include "moesaic/error.hpp"

namespace moesaic::weights {
namespace {

constexpr int kCodesAt = 4;  // in a block, behind the scale

bool is_nan(std::byte code) { return (code & std::byte{0x7f}) == std::byte{0x7f}; }

}  // namespace

void check_codes(const char* operation, const std::string& what, QuantType type,
                 std::span<const std::byte> rows, std::int64_t cols) {
  if (type != QuantType::E4M3) return;
  const QuantTraits& facts = traits(type);
  const auto size = static_cast<std::size_t>(facts.block_bytes);
  for (std::size_t block = 0; (block + 1) * size <= rows.size(); ++block) {
    const auto codes = rows.subspan(block * size + kCodesAt, size - kCodesAt);
    bool bad = false;
    for (const std::byte code : codes) bad |= is_nan(code);
    if (!bad) continue;
    std::size_t at = 0;
    while (!is_nan(codes[at])) ++at;
    const auto value =
        static_cast<std::int64_t>(block) * facts.block_elems + static_cast<std::int64_t>(at);
    throw ConfigError(Problem{.operation = operation,
                              .what = what + " at row " + std::to_string(value / cols) +
                                      ", column " + std::to_string(value % cols),
                              .expected = "an E4M3 number",
                              .got = "a code of NaN",
                              .hint = {}});
  }
}

}  // namespace moesaic::weights
