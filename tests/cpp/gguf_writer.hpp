#pragma once

/// A small GGUF writer for tests. It writes what it is told, so it can also write broken files:
/// every header field may be overridden, and the bytes before writing are open to the test.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/gguf.hpp"
#include "moesaic/quant.hpp"

namespace moesaic::test {

/// Grows a little-endian byte string.
class ByteWriter {
 public:
  template <class T>
  ByteWriter& put(T value) {
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    bytes_.append(raw, sizeof(T));
    return *this;
  }
  ByteWriter& text(std::string_view value) {
    put<std::uint64_t>(value.size());
    bytes_ += value;
    return *this;
  }
  ByteWriter& raw(std::string_view value) {
    bytes_ += value;
    return *this;
  }
  void pad_to(std::uint64_t alignment) {
    while (bytes_.size() % alignment != 0) bytes_ += '\0';
  }
  const std::string& bytes() const { return bytes_; }
  std::size_t size() const { return bytes_.size(); }

 private:
  std::string bytes_;
};

class GgufWriter {
 public:
  // Overrides of what would be written.
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::uint64_t alignment = 32;
  std::optional<std::uint64_t> tensor_count, entry_count;

  /// A key with its value already encoded.
  GgufWriter& entry(std::string_view key, GgufType type, const ByteWriter& value) {
    entries_.text(key).put(static_cast<std::uint32_t>(type)).raw(value.bytes());
    ++entries_written_;
    return *this;
  }
  template <class T>
  GgufWriter& scalar(std::string_view key, GgufType type, T value) {
    return entry(key, type, ByteWriter().put(value));
  }
  GgufWriter& u32(std::string_view key, std::uint32_t value) {
    return scalar(key, GgufType::U32, value);
  }
  GgufWriter& string(std::string_view key, std::string_view value) {
    return entry(key, GgufType::String, ByteWriter().text(value));
  }
  template <class T>
  GgufWriter& array(std::string_view key, GgufType element, const std::vector<T>& values) {
    ByteWriter bytes;
    bytes.put(static_cast<std::uint32_t>(element)).put<std::uint64_t>(values.size());
    for (const T& value : values) bytes.put(value);
    return entry(key, GgufType::Array, bytes);
  }
  GgufWriter& strings(std::string_view key, const std::vector<std::string>& values) {
    ByteWriter bytes;
    bytes.put(static_cast<std::uint32_t>(GgufType::String)).put<std::uint64_t>(values.size());
    for (const std::string& value : values) bytes.text(value);
    return entry(key, GgufType::Array, bytes);
  }

  /// A tensor as stored: dimensions innermost first. Its offset is the end of the data so far
  /// unless given.
  GgufWriter& tensor(std::string_view name, const std::vector<std::int64_t>& ne, std::uint32_t type,
                     std::string_view data, std::optional<std::uint64_t> offset = std::nullopt) {
    data_.pad_to(alignment);
    infos_.text(name).put(static_cast<std::uint32_t>(ne.size()));
    for (const std::int64_t dim : ne) infos_.put(dim);
    infos_.put(type).put<std::uint64_t>(offset.value_or(data_.size()));
    data_.raw(data);
    ++tensors_written_;
    return *this;
  }
  /// A well-formed tensor, shape outermost first, filled with bytes that differ from place to
  /// place.
  GgufWriter& filled(std::string_view name, QuantType type,
                     const std::vector<std::int64_t>& shape) {
    std::int64_t nbytes = row_bytes(type, shape.back());
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) nbytes *= shape[i];
    std::string data(static_cast<std::size_t>(nbytes), '\0');
    for (char& byte : data) byte = static_cast<char>(next_byte_ = next_byte_ * 5 + 17);
    return tensor(name, {shape.rbegin(), shape.rend()}, static_cast<std::uint32_t>(type), data);
  }

  std::string bytes() const {
    ByteWriter file;
    file.raw(magic).put(version);
    file.put(tensor_count.value_or(tensors_written_)).put(entry_count.value_or(entries_written_));
    file.raw(entries_.bytes()).raw(infos_.bytes());
    if (data_.size() > 0) file.pad_to(alignment);
    file.raw(data_.bytes());
    return file.bytes();
  }

 private:
  ByteWriter entries_, infos_, data_;
  std::uint64_t entries_written_ = 0, tensors_written_ = 0;
  std::uint8_t next_byte_ = 1;
};

/// A folder that goes away with its object.
class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "moesaic-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path write(const std::string& name, std::string_view bytes) const {
    const std::filesystem::path file = path_ / name;
    std::ofstream out(file, std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!out.flush()) throw std::runtime_error("cannot write " + file.string());
    return file;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace moesaic::test
