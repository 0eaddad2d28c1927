#include "gguf/cursor.hpp"

#include <algorithm>
#include <span>

#include "moesaic/error.hpp"

namespace moesaic::gguf {

void fail(const std::filesystem::path& path, std::uint64_t offset, std::string_view field,
          std::string expected, std::string got, std::string hint) {
  throw FormatError(Problem{
      "GgufFile", path.string() + ", byte " + std::to_string(offset) + ": " + std::string(field),
      std::move(expected), std::move(got), std::move(hint)});
}

std::string quote(std::string_view text) {
  constexpr std::size_t kShown = 80;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kShown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kShown ? "...'" : "'");
}

std::string_view Cursor::read_string(std::string_view field, std::uint64_t max_bytes) {
  const std::uint64_t start = position_;
  const auto length = read<std::uint64_t>(field);
  if (length > max_bytes) {
    fail(path(), start, field, "a string of at most " + std::to_string(max_bytes) + " bytes",
         std::to_string(length));
  }
  return {reinterpret_cast<const char*>(take(length, field)), static_cast<std::size_t>(length)};
}

HeadBytes Cursor::release(std::uint64_t size) {
  if (size == 0) return {};
  // Shrinking does not fail in practice; if it did, the larger block would be as good.
  if (void* smaller = std::realloc(bytes_.get(), static_cast<std::size_t>(size))) {
    (void)bytes_.release();
    bytes_.reset(static_cast<std::byte*>(smaller));
  }
  return std::move(bytes_);
}

void Cursor::load(std::uint64_t size, std::string_view field) {
  if (size > remaining()) {
    fail(path(), position_, field, std::to_string(size) + " bytes",
         std::to_string(remaining()) + " bytes up to the end of the file",
         "the file is truncated or damaged");
  }
  const std::uint64_t end = position_ + size;
  if (end > kMaxHeadBytes) {
    fail(path(), position_, field,
         "at most " + std::to_string(kMaxHeadBytes) + " bytes of metadata",
         "at least " + std::to_string(end));
  }
  constexpr std::uint64_t kFirst = std::uint64_t{1} << 18;
  const std::uint64_t target =
      std::min(file_.size(), std::max(end, loaded_ + loaded_ / 2 + kFirst));
  // A large block grows in place with realloc, where a vector would hold two copies at its peak.
  void* larger = std::realloc(bytes_.get(), static_cast<std::size_t>(target));
  require<OutOfMemoryError>(larger != nullptr, [&] {
    return Problem{"GgufFile",
                   path().string() + ": metadata",
                   std::to_string(target) + " bytes of memory",
                   "none",
                   {}};
  });
  (void)bytes_.release();
  bytes_.reset(static_cast<std::byte*>(larger));
  file_.read(loaded_, {bytes_.get() + loaded_, static_cast<std::size_t>(target - loaded_)});
  loaded_ = target;
}

}  // namespace moesaic::gguf
