#pragma once

/// A file on disk, to be read or mapped as a whole. In this room only these functions call the
/// system.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/open_file.hpp"

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

  const std::filesystem::path& path() const { return path_; }
  std::uint64_t size() const { return size_; }             ///< as it was when the file was opened
  std::int64_t changed_ns() const { return changed_ns_; }  ///< time of change then, since the epoch

  /// Fills `out` from `offset`. Throws IoError, and FormatError when the file has become shorter.
  void read(std::uint64_t offset, std::span<std::byte> out) const;
  /// Maps the whole file; it stays mapped after this object is gone. Throws IoError.
  std::shared_ptr<const Mapping> map() const;
  /// The error of a file that ends at `offset`, where `bytes` more were wanted.
  [[noreturn]] void throw_shorter(std::uint64_t offset, std::size_t bytes) const;

 private:
  friend class DirectFile;
  /// The error of a system call, from errno.
  [[noreturn]] void throw_failed(const char* call) const;

  std::filesystem::path path_;
  Descriptor descriptor_;
  std::uint64_t size_ = 0;
  std::int64_t changed_ns_ = 0;
};

/// An open file once more, read past the page cache (O_DIRECT): from the disk to where the bytes are
/// wanted, without a copy and without pages that push others out. Reads are safe from several threads.
class DirectFile {
 public:
  /// Offsets, sizes and addresses of reads are multiples of this.
  static constexpr std::int64_t kAlignment = 4096;

  /// Null where the system or the file system has no such reads; `why` then says so.
  static std::unique_ptr<const DirectFile> open(std::shared_ptr<const InputFile> file,
                                                std::string& why);
  /// Fills `out` from `offset`, as far as the file goes. Errors: as InputFile::read.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  DirectFile(std::shared_ptr<const InputFile> file, Descriptor descriptor)
      : file_(std::move(file)), descriptor_(std::move(descriptor)) {}

  std::shared_ptr<const InputFile> file_;
  Descriptor descriptor_;
};

}  // namespace moesaic::gguf
