#pragma once

/// A file on disk, to be read or mapped as a whole. In this room only these functions call the
/// system.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

namespace moesaic::gguf {

/// A read-only mapping of a whole file, unmapped with its last owner.
class Mapping {
 public:
  Mapping(const std::byte* data, std::size_t size) : data_(data), size_(size) {}
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_;
  std::size_t size_;
};

/// What keeps a piece of a mapping. When its last copy is gone, the pages of the piece go back to the
/// system, so that a loop over tensors does not end with the whole file in the memory of the
/// process; whoever reads them again gets them again.
std::shared_ptr<const void> lend(std::shared_ptr<const Mapping> mapping,
                                 std::span<const std::byte> piece);

/// An open regular file. Reads are safe from several threads.
class InputFile {
 public:
  /// Throws IoError, also for directories and other things that are not regular files.
  explicit InputFile(const std::filesystem::path& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::uint64_t size() const { return size_; }  ///< as it was when the file was opened

  /// Fills `out` from `offset`. Throws IoError, and FormatError when the file has become shorter.
  void read(std::uint64_t offset, std::span<std::byte> out) const;
  /// Maps the whole file; it stays mapped after this object is gone. Throws IoError.
  std::shared_ptr<const Mapping> map() const;

 private:
  /// The error of a system call, from errno.
  [[noreturn]] void throw_failed(const char* call) const;

  std::filesystem::path path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

}  // namespace moesaic::gguf
