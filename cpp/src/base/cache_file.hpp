#pragma once

/// Files of bytes that can be made again: written whole or not at all, and mapped by every process
/// that wants them.
///
///   byte 0       "moesaic cache 1", then "label: value" for each fact, one a line; zeros behind
///   byte 4080    BlockHash of the bytes behind the head
///   byte 4088    Hash of the head up to here
///   byte 4096    the bytes
///
/// Numbers are little-endian. A reader knows the text that it wants and takes no other, so that
/// nothing of a file is parsed. It looks at the head and at the size of the file; the bytes behind
/// the head are hashed only when asked for (check_entry), since that reads all of them.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/hash.hpp"
#include "base/open_file.hpp"

namespace moesaic {

/// One file, and what its bytes depend on.
struct CacheEntry {
  std::filesystem::path folder;
  std::string name;                                          ///< of the file in it
  std::vector<std::pair<std::string, std::string>> facts{};  ///< label and value, without newlines
  std::int64_t bytes = 0;                                    ///< a multiple of BlockHash::kBlock

  std::filesystem::path path() const { return folder / name; }
};

/// `text` as part of a file's name: other characters than letters, digits, "." and "-" are "_", and
/// it is no longer than 100.
std::string file_name_of(std::string_view text);
/// 16 hexadecimal digits.
std::string hex_of(std::uint64_t value);

/// The bytes of an entry, mapped read-only while their owner lives. Null where no good file has
/// them, and `why` says what is there instead.
std::shared_ptr<const std::byte> map_entry(const CacheEntry& entry, std::string& why);

/// Reads a whole file of a cache. Empty when it is as it was written, else what is wrong. Throws
/// IoError, and OperationCancelled when it is interrupted.
std::string check_entry(const std::filesystem::path& path);

/// The right to write to a folder, which one thread of one process has at a time. A process that ends
/// gives it back.
class FolderLock {
 public:
  /// Null while another has it. On file systems without locks everybody gets it: names are taken by
  /// renaming whole files, so that nothing but work is lost. Throws IoError.
  static std::unique_ptr<const FolderLock> take(const std::filesystem::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

  /// Whether it keeps others out.
  bool exclusive() const { return exclusive_; }

 private:
  FolderLock(Descriptor descriptor, bool exclusive)
      : descriptor_(std::move(descriptor)), exclusive_(exclusive) {}
  Descriptor descriptor_;
  bool exclusive_;
};

/// Writes one entry to a file of another name, which takes its own when it is whole and on the disk.
/// Whoever reads the name sees the old file or the new one.
class EntryWriter {
 public:
  /// Makes room for all bytes, so that a full disk shows here. Under an exclusive lock what writers
  /// that were killed left behind is removed. Throws IoError.
  EntryWriter(CacheEntry entry, const FolderLock& lock);
  /// Removes the file unless finish() was reached.
  ~EntryWriter();
  EntryWriter(const EntryWriter&) = delete;
  EntryWriter& operator=(const EntryWriter&) = delete;

  /// The next bytes, a multiple of BlockHash::kBlock. Throws IoError, and OperationCancelled.
  void write(std::span<const std::byte> bytes);
  /// Once all bytes are written. Throws IoError.
  void finish();

 private:
  void put(std::span<const std::byte> bytes, std::int64_t offset);
  [[noreturn]] void fail(int code, const char* call) const;

  CacheEntry entry_;
  std::filesystem::path temporary_;
  Descriptor descriptor_;
  std::int64_t written_ = 0;
  BlockHash hash_;
};

}  // namespace moesaic
