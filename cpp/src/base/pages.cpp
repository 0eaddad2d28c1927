#include "base/pages.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <string>

#include "moesaic/error.hpp"

namespace moesaic {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
/// Smaller allocations would lose more by rounding up to huge pages than these save.
constexpr std::size_t kHugeFrom = std::size_t{4} << 20;
constexpr std::align_val_t kAlignment{64};

[[noreturn]] void out_of_memory(std::size_t bytes) {
  throw OutOfMemoryError(
      Problem{"allocate", "weights", std::to_string(bytes) + " bytes", "no memory", ""});
}

struct Unmap {
  std::size_t bytes;
  void operator()(std::byte* memory) const { munmap(memory, bytes); }
};

std::shared_ptr<std::byte> map_pages(std::size_t bytes) {
  if (bytes > std::numeric_limits<std::size_t>::max() - 2 * kHugePage) out_of_memory(bytes);
  const std::size_t size = allocated_bytes(bytes);
  const std::size_t mapped = size + kHugePage;  // room to align
  void* const memory =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) out_of_memory(bytes);
  auto* const first = static_cast<std::byte*>(memory);
  const std::size_t before =
      (kHugePage - reinterpret_cast<std::uintptr_t>(first) % kHugePage) % kHugePage;
  const std::size_t behind = mapped - size - before;
  if (before > 0) munmap(first, before);
  if (behind > 0) munmap(first + before + size, behind);
#if defined(MADV_HUGEPAGE)
  madvise(first + before, size, MADV_HUGEPAGE);  // only a wish: refused where huge pages are off
#endif
  return {first + before, Unmap{size}};
}

/// Whether the page of `at` is in memory; true where the system does not tell.
bool is_in_memory(std::uintptr_t at) {
#if defined(__linux__)
  unsigned char in_memory = 1;
  return ::mincore(reinterpret_cast<void*>(at), 1, &in_memory) != 0 || (in_memory & 1) != 0;
#else
  char in_memory = 1;
  return ::mincore(reinterpret_cast<void*>(at), 1, &in_memory) != 0 || (in_memory & 1) != 0;
#endif
}

}  // namespace

std::size_t allocated_bytes(std::size_t bytes) {
  if (bytes < kHugeFrom) return bytes;
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

void will_read(std::span<const std::byte> bytes) noexcept {
  if (bytes.empty()) return;
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data());
  const std::uintptr_t first = begin / page * page;
  const std::uintptr_t last = (begin + bytes.size() - 1) / page * page;
  // Looking at the ends costs next to nothing beside the walk over all pages that the advice takes.
  if (is_in_memory(first) && is_in_memory(last)) return;
  ::madvise(reinterpret_cast<void*>(first), last + page - first, MADV_WILLNEED);
}

std::shared_ptr<std::byte> allocate_pages(std::size_t bytes) {
  try {
    if (bytes >= kHugeFrom) return map_pages(bytes);
    auto* const memory = static_cast<std::byte*>(::operator new(bytes, kAlignment));
    std::fill_n(memory, bytes, std::byte{0});
    return {memory, [](std::byte* p) { ::operator delete(p, kAlignment); }};
  } catch (const std::bad_alloc&) {
    out_of_memory(bytes);
  }
}

}  // namespace moesaic
