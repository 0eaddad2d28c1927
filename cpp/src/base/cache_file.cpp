#include "base/cache_file.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <string_view>
#include <system_error>

#include "base/open_file.hpp"
#include "moesaic/error.hpp"
#include "moesaic/interrupt.hpp"

namespace moesaic {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers of the head are little-endian");

constexpr std::size_t kHead = 4096;
constexpr std::size_t kHashAt = kHead - 16;
constexpr std::string_view kFirstLine = "moesaic cache 1\n";
constexpr const char* kOperation = "weight cache";

using Head = std::array<std::byte, kHead>;

std::string failed(const char* call) {
  return std::string(call) + ": " + std::generic_category().message(errno);
}

[[noreturn]] void throw_io(int code, const std::filesystem::path& path, const char* call) {
  throw IoError(code, path.string(), std::string(kOperation) + ": " + call);
}

std::uint64_t number_at(const Head& head, std::size_t at) {
  std::uint64_t number = 0;
  std::memcpy(&number, head.data() + at, sizeof(number));
  return number;
}

std::uint64_t hash_of(const Head& head) {
  Hash hash;
  hash.add(std::span(head).first(kHead - sizeof(std::uint64_t)));
  return hash.value();
}

/// The head of an entry whose bytes have this hash.
Head head_of(const CacheEntry& entry, std::uint64_t hash) {
  std::string text(kFirstLine);
  for (const auto& [label, value] : entry.facts) text += label + ": " + value + "\n";
  text += "number of bytes: " + std::to_string(entry.bytes) + "\n";
  require<FormatError>(text.size() < kHashAt, [&] {
    return Problem{.operation = kOperation,
                   .what = entry.path().string(),
                   .expected = "facts of up to " + std::to_string(kHashAt) + " bytes",
                   .got = std::to_string(text.size()),
                   .hint = {}};
  });
  Head head{};
  std::memcpy(head.data(), text.data(), text.size());
  std::memcpy(head.data() + kHashAt, &hash, sizeof(hash));
  const std::uint64_t own = hash_of(head);
  std::memcpy(head.data() + kHead - sizeof(own), &own, sizeof(own));
  return head;
}

std::string_view text_of(const Head& head) {
  const std::string_view all(reinterpret_cast<const char*>(head.data()), kHashAt);
  return all.substr(0, all.find('\0'));
}

/// The label of the first fact that `got` has otherwise than `wanted`.
std::string differing_fact(std::string_view wanted, std::string_view got) {
  while (!wanted.empty()) {
    const std::string_view line = wanted.substr(0, wanted.find('\n') + 1);
    if (!got.starts_with(line)) return std::string(line.substr(0, line.find(':')));
    wanted.remove_prefix(line.size());
    got.remove_prefix(line.size());
  }
  return "number of facts";
}

/// Reads the head of an open file and its size. Returns what is wrong with them, or nothing.
std::string read_head(int descriptor, Head& head, std::int64_t& size) {
  struct stat info{};
  if (::fstat(descriptor, &info) != 0) return failed("stat");
  if (!S_ISREG(info.st_mode)) return "it is no regular file";
  size = info.st_size;
  const ssize_t got = read_file(descriptor, 0, head);
  if (got < 0) return failed("read");
  const bool ours = std::memcmp(head.data(), kFirstLine.data(), kFirstLine.size()) == 0;
  if (static_cast<std::size_t>(got) < kHead) return "it is cut short";
  if (hash_of(head) != number_at(head, kHead - sizeof(std::uint64_t))) {
    return ours ? "its head is damaged" : "it is no file of this cache, or of another version";
  }
  return ours ? "" : "it is of another version";
}

struct Unmap {
  void* data;
  std::size_t size;
  void operator()(const std::byte* /*bytes*/) const { ::munmap(data, size); }
};

}  // namespace

std::string file_name_of(std::string_view text) {
  constexpr std::size_t kLongest = 100;
  std::string name(text.substr(0, kLongest));
  for (char& c : name) {
    const bool kept = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                      c == '.' || c == '-';
    if (!kept) c = '_';
  }
  return name;
}

std::string hex_of(std::uint64_t value) {
  std::string text(16, '0');
  for (auto at = text.rbegin(); at != text.rend(); ++at, value >>= 4) {
    *at = "0123456789abcdef"[value & 15U];
  }
  return text;
}

std::shared_ptr<const std::byte> map_entry(const CacheEntry& entry, std::string& why) {
  const Descriptor file = open_to_read(entry.path());
  if (!file) {
    why = errno == ENOENT ? "there is none" : failed("open");
    return nullptr;
  }
  Head head;
  std::int64_t size = 0;
  why = read_head(file.get(), head, size);
  if (!why.empty()) return nullptr;
  const Head wanted = head_of(entry, number_at(head, kHashAt));
  if (head != wanted) {
    why = "it is of another " + differing_fact(text_of(wanted), text_of(head));
    return nullptr;
  }
  const std::int64_t needed = static_cast<std::int64_t>(kHead) + entry.bytes;
  if (size != needed) {
    why = "it has " + std::to_string(size) + " bytes of " + std::to_string(needed);
    return nullptr;
  }
  const auto length = static_cast<std::size_t>(size);
  void* const data = ::mmap(nullptr, length, PROT_READ, MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) {
    why = failed("mmap");
    return nullptr;
  }
#if defined(MADV_HUGEPAGE)
  ::madvise(data, length, MADV_HUGEPAGE);  // only a wish, which few file systems grant
#endif
  return {static_cast<const std::byte*>(data) + kHead, Unmap{data, length}};
}

std::string check_entry(const std::filesystem::path& path) {
  const Descriptor file = open_to_read(path);
  if (!file) throw_io(errno, path, "open");
  Head head;
  std::int64_t size = 0;
  std::string wrong = read_head(file.get(), head, size);
  if (!wrong.empty()) return wrong;
  if (!text_of(head).ends_with("\nnumber of bytes: " + std::to_string(size - std::int64_t{kHead}) +
                               "\n")) {
    return "it is not as long as it says";
  }
  BlockHash hash;
  std::vector<std::byte> buffer(std::size_t{1} << 20);
  for (auto at = static_cast<std::int64_t>(kHead); at < size;) {
    const auto left = static_cast<std::size_t>(size - at);
    const std::span piece = std::span(buffer).first(std::min(buffer.size(), left));
    const ssize_t got = read_file(file.get(), static_cast<std::uint64_t>(at), piece);
    if (got < 0) throw_io(errno, path, "read");
    if (static_cast<std::size_t>(got) < piece.size()) return "it is cut short";
    if (piece.size() % BlockHash::kBlock != 0) return "it is not as long as it says";
    hash.add(piece);
    at += got;
  }
  return hash.value() == number_at(head, kHashAt) ? ""
                                                  : "its bytes are not those that were written";
}

// ------------------------------------------------------------------------------- FolderLock ----

std::unique_ptr<const FolderLock> FolderLock::take(const std::filesystem::path& folder) {
  Descriptor opened = open_file(folder, O_RDONLY | O_DIRECTORY);
  if (!opened) throw_io(errno, folder, "open");
  int code = 0;
  do {
    code = ::flock(opened.get(), LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
  } while (code == EINTR);
  if (code == EWOULDBLOCK) return nullptr;
  return std::unique_ptr<const FolderLock>(new FolderLock(std::move(opened), code == 0));
}

FolderLock::~FolderLock() {
  // A forked child holds the lock as well until it closes its copy; this ends it for both.
  if (exclusive_) ::flock(descriptor_.get(), LOCK_UN);
}

// ------------------------------------------------------------------------------ EntryWriter ----

namespace {

std::string temporary_prefix(const std::string& name) { return "." + name + "."; }

constexpr std::string_view kTemporarySuffix = ".tmp";

/// A name that no other writer takes.
std::string temporary_name(const std::string& name) {
  static std::atomic<std::uint64_t> count{0};
  Hash hash;
  hash.add(static_cast<std::uint64_t>(::getpid()));
  hash.add(count.fetch_add(1));
  hash.add(static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count()));
  return temporary_prefix(name) + hex_of(hash.value()) + std::string(kTemporarySuffix);
}

void remove_left_behind(const CacheEntry& entry) {
  std::error_code ignored;  // what cannot be removed is in nobody's way
  for (std::filesystem::directory_iterator at(entry.folder, ignored), end; !ignored && at != end;
       at.increment(ignored)) {
    const std::string name = at->path().filename().string();
    if (!name.starts_with(temporary_prefix(entry.name)) || !name.ends_with(kTemporarySuffix)) {
      continue;
    }
    std::error_code not_removed;
    std::filesystem::remove(at->path(), not_removed);
  }
}

/// Makes room for a file of `size` bytes. Returns the errno value of a refusal, or 0.
int reserve(int descriptor, std::int64_t size) {
#if defined(__linux__)
  int code = 0;
  do {
    code = ::posix_fallocate(descriptor, 0, static_cast<off_t>(size));
  } while (code == EINTR);
  const bool unknown_here = code == EOPNOTSUPP || code == EINVAL || code == ENOSYS;
  return unknown_here ? 0 : code;
#else
  static_cast<void>(descriptor), static_cast<void>(size);  // writing finds out
  return 0;
#endif
}

}  // namespace

EntryWriter::EntryWriter(CacheEntry entry, const FolderLock& lock) : entry_(std::move(entry)) {
  if (lock.exclusive()) remove_left_behind(entry_);
  temporary_ = entry_.folder / temporary_name(entry_.name);
  descriptor_ = open_file(temporary_, O_WRONLY | O_CREAT | O_EXCL, 0666);
  if (!descriptor_) throw_io(errno, temporary_, "create");
  const int code = reserve(descriptor_.get(), static_cast<std::int64_t>(kHead) + entry_.bytes);
  if (code == 0) return;
  ::unlink(temporary_.c_str());
  throw_io(code, entry_.path(), "make room");
}

EntryWriter::~EntryWriter() {
  if (descriptor_) ::unlink(temporary_.c_str());
}

void EntryWriter::fail(int code, const char* call) const { throw_io(code, entry_.path(), call); }

void EntryWriter::put(std::span<const std::byte> bytes, std::int64_t offset) {
  while (!bytes.empty()) {
    Interrupt::check();
    const ssize_t done = ::pwrite(descriptor_.get(), bytes.data(),
                                  std::min(bytes.size(), kMaxFileCall), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail(errno, "write");
    bytes = bytes.subspan(static_cast<std::size_t>(done));
    offset += done;
  }
}

void EntryWriter::write(std::span<const std::byte> bytes) {
  put(bytes, static_cast<std::int64_t>(kHead) + written_);
  written_ += static_cast<std::int64_t>(bytes.size());
  hash_.add(bytes);
}

void EntryWriter::finish() {
  require<FormatError>(written_ == entry_.bytes, [&] {
    return Problem{.operation = kOperation,
                   .what = entry_.path().string(),
                   .expected = std::to_string(entry_.bytes) + " bytes",
                   .got = std::to_string(written_),
                   .hint = {}};
  });
  put(head_of(entry_, hash_.value()), 0);
  if (::fsync(descriptor_.get()) != 0) fail(errno, "fsync");
  if (::rename(temporary_.c_str(), entry_.path().c_str()) != 0) fail(errno, "rename");
  descriptor_.reset();
  // The name is on the disk when the folder is; where folders cannot be synced, sooner or later.
  const Descriptor folder = open_file(entry_.folder, O_RDONLY | O_DIRECTORY);
  if (folder) ::fsync(folder.get());
}

}  // namespace moesaic
