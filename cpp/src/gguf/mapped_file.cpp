#include "gguf/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "moesaic/error.hpp"

namespace moesaic::gguf {

Mapping::~Mapping() {
  if (size_ > 0) ::munmap(const_cast<std::byte*>(data_), size_);
}

InputFile::InputFile(const std::filesystem::path& path)
    : path_(path), descriptor_(open_to_read(path)) {
  if (!descriptor_) throw IoError(errno, path.string(), "open");

  struct stat info{};
  int code = ::fstat(descriptor_.get(), &info) == 0 ? 0 : errno;
  if (code == 0 && S_ISDIR(info.st_mode)) code = EISDIR;
  if (code == 0 && !S_ISREG(info.st_mode)) code = EINVAL;
  if (code != 0) throw IoError(code, path.string(), "open");
  size_ = static_cast<std::uint64_t>(info.st_size);
#if defined(__APPLE__)
  const timespec& changed = info.st_mtimespec;
#else
  const timespec& changed = info.st_mtim;
#endif
  changed_ns_ = std::int64_t{changed.tv_sec} * 1'000'000'000 + changed.tv_nsec;
}

void InputFile::throw_failed(const char* call) const {
  const int code = errno;
  if (code != ENOMEM) throw IoError(code, path_.string(), call);
  throw OutOfMemoryError(
      Problem{"GgufFile", path_.string(), "memory", std::string("none: ") + call, {}});
}

void InputFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  const ssize_t got = read_file(descriptor_.get(), offset, out);
  if (got < 0) throw_failed("read");
  const auto done = static_cast<std::size_t>(got);
  if (done < out.size()) throw_shorter(offset + done, out.size() - done);
}

void InputFile::throw_shorter(std::uint64_t offset, std::size_t bytes) const {
  throw FormatError(Problem{"GgufFile", path_.string() + ", byte " + std::to_string(offset),
                            std::to_string(bytes) + " more bytes", "the end of the file",
                            "the file became shorter after it was opened"});
}

std::unique_ptr<const DirectFile> DirectFile::open(std::shared_ptr<const InputFile> file,
                                                   std::string& why) {
#if defined(__linux__)
  // What the path leads to may have changed since; this leads to the file that is open.
  const std::string path = "/proc/self/fd/" + std::to_string(file->descriptor_.get());
  Descriptor descriptor = open_file(path, O_RDONLY | O_DIRECT);
  if (!descriptor) {
    why = std::string("open with O_DIRECT: ") + std::strerror(errno);
    return nullptr;
  }
  std::unique_ptr<const DirectFile> direct(new DirectFile(std::move(file), std::move(descriptor)));
  // Some file systems take the flag and refuse the reads.
  const std::align_val_t alignment{static_cast<std::size_t>(kAlignment)};
  const auto release = [alignment](void* memory) { ::operator delete(memory, alignment); };
  const std::unique_ptr<void, decltype(release)> block(
      ::operator new(static_cast<std::size_t>(kAlignment), alignment), release);
  if (::pread(direct->descriptor_.get(), block.get(), static_cast<std::size_t>(kAlignment), 0) >=
      0) {
    return direct;
  }
  why = std::string("read with O_DIRECT: ") + std::strerror(errno);
  return nullptr;
#else
  why = "this system has no O_DIRECT";
  return nullptr;
#endif
}

void DirectFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  // The last block may reach over the end of the file.
  const std::uint64_t size = file_->size();
  const std::uint64_t end = std::min(offset + out.size(), size);
  while (offset < end) {
    const ssize_t got =
        ::pread(descriptor_.get(), out.data(), out.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) file_->throw_failed("read");
    const auto bytes = static_cast<std::uint64_t>(got);
    const bool whole_blocks = bytes % static_cast<std::uint64_t>(kAlignment) == 0;
    if (offset + bytes < end && (bytes == 0 || !whole_blocks)) {
      file_->throw_shorter(offset + bytes, static_cast<std::size_t>(end - offset - bytes));
    }
    offset += bytes;
    out = out.subspan(static_cast<std::size_t>(std::min<std::uint64_t>(bytes, out.size())));
  }
}

std::shared_ptr<const void> lend(std::shared_ptr<const Mapping> mapping,
                                 std::span<const std::byte> piece) {
  return {piece.data(), [mapping = std::move(mapping), size = piece.size()](const void* data) {
            // Pages that lie in the piece alone; those at its ends may be a neighbour's.
            static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
            const auto begin = reinterpret_cast<std::uintptr_t>(data);
            const std::uintptr_t first = (begin + page - 1) / page * page;
            const std::uintptr_t end = (begin + size) / page * page;
            if (first >= end) return;
            ::madvise(const_cast<std::byte*>(static_cast<const std::byte*>(data)) + (first - begin),
                      end - first, MADV_DONTNEED);
          }};
}

std::shared_ptr<const Mapping> InputFile::map() const {
  const auto size = static_cast<std::size_t>(size_);
  if (size == 0) return std::make_shared<const Mapping>(nullptr, 0);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor_.get(), 0);
  if (data == MAP_FAILED) throw_failed("mmap");
  try {
    return std::make_shared<const Mapping>(static_cast<const std::byte*>(data), size);
  } catch (...) {
    ::munmap(data, size);
    throw;
  }
}

}  // namespace moesaic::gguf
