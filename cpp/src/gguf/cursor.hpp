#pragma once

/// Bounded, little-endian reading of a file's head. Every read names its field, so that an error
/// can say what was missing and where.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>

#include "gguf/mapped_file.hpp"

namespace moesaic::gguf {

static_assert(std::endian::native == std::endian::little, "GGUF is read in its own byte order");

/// A file with more metadata than this is refused; real ones have some 10 MB.
inline constexpr std::uint64_t kMaxHeadBytes = std::uint64_t{1} << 30;

/// Throws FormatError: "GgufFile: PATH, byte OFFSET: FIELD: expected ..., got ... (hint)".
[[noreturn]] void fail(const std::filesystem::path& path, std::uint64_t offset,
                       std::string_view field, std::string expected, std::string got,
                       std::string hint = {});

/// Makes text from a file safe for a message: quoted, shortened, with control characters escaped.
std::string quote(std::string_view text);

/// Write a * b or a + b to `out`; false when the result does not fit.
inline bool checked_multiply(std::uint64_t a, std::uint64_t b, std::uint64_t& out) {
  return !__builtin_mul_overflow(a, b, &out);
}
inline bool checked_add(std::uint64_t a, std::uint64_t b, std::uint64_t& out) {
  return !__builtin_add_overflow(a, b, &out);
}

struct FreeBytes {
  void operator()(std::byte* bytes) const { std::free(bytes); }
};
using HeadBytes = std::unique_ptr<std::byte[], FreeBytes>;

/// Reads forward from the start of a file into memory of its own, so that what was checked cannot
/// change or vanish with the file. Grows as it is asked, never beyond the file.
class Cursor {
 public:
  explicit Cursor(const InputFile& file) : file_(file) {}

  std::uint64_t position() const { return position_; }
  std::uint64_t remaining() const { return file_.size() - position_; }
  const std::filesystem::path& path() const { return file_.path(); }

  /// The next `size` bytes, valid until the next call. Throws FormatError beyond the end of the
  /// file.
  const std::byte* take(std::uint64_t size, std::string_view field) {
    if (size > loaded_ - position_) load(size, field);
    const std::byte* result = bytes_.get() + position_;
    position_ += size;
    return result;
  }

  template <class T>
    requires std::is_trivially_copyable_v<T>
  T read(std::string_view field) {
    T value;
    std::memcpy(&value, take(sizeof(T), field), sizeof(T));
    return value;
  }

  /// Reads a string, which is a u64 length and then its bytes. `max_bytes` bounds the length before
  /// anything is read.
  std::string_view read_string(std::string_view field, std::uint64_t max_bytes = kMaxHeadBytes);

  /// Gives away the first `size` bytes of what was read. The cursor must not be used afterwards.
  HeadBytes release(std::uint64_t size);

 private:
  void load(std::uint64_t size, std::string_view field);

  const InputFile& file_;
  HeadBytes bytes_;
  std::uint64_t loaded_ = 0;
  std::uint64_t position_ = 0;
};

}  // namespace moesaic::gguf
