#include "base/pages.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "moesaic/error.hpp"
#include "moesaic/topology.hpp"
#include "moesaic/tuning.hpp"

#if defined(__linux__)
#include <sys/syscall.h>

#include <cerrno>
#endif

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
  const std::size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
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

std::shared_ptr<std::byte> allocate_small(std::size_t bytes) {
  auto* const memory = static_cast<std::byte*>(::operator new(bytes, kAlignment));
  std::fill_n(memory, bytes, std::byte{0});
  return {memory, [](std::byte* p) { ::operator delete(p, kAlignment); }};
}

/// Policies of mbind that, other than MPOL_BIND, never kill the process when nodes are full.
enum class Policy : int { Preferred = 1, Interleave = 3 };

/// Where pages of [memory, memory + bytes) that nobody has touched yet are to come from. Returns 0,
/// or the errno value of the refusal (containers often forbid the call).
int place(std::byte* memory, std::size_t bytes, Policy policy,
          const std::vector<std::int32_t>& nodes) {
#if defined(__linux__) && defined(SYS_mbind)
  constexpr unsigned long kBits = 1024;
  constexpr unsigned long kWordBits = 8 * sizeof(unsigned long);
  unsigned long mask[kBits / kWordBits] = {};
  for (const std::int32_t node : nodes) {
    const auto id = static_cast<unsigned long>(node);
    if (id >= kBits) return EINVAL;
    mask[id / kWordBits] |= 1UL << (id % kWordBits);
  }
  // The kernel counts one bit less than it is told.
  const long failed =
      syscall(SYS_mbind, memory, bytes, static_cast<long>(policy), mask, kBits + 1, 0UL);
  return failed == 0 ? 0 : errno;
#else
  static_cast<void>(memory), static_cast<void>(bytes), static_cast<void>(policy);
  static_cast<void>(nodes);
  return 0;
#endif
}

/// Runs make(), whose bad_alloc becomes the library's error.
template <class Make>
auto or_out_of_memory(std::size_t bytes, const Make& make) {
  try {
    return make();
  } catch (const std::bad_alloc&) {
    out_of_memory(bytes);
  }
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
  return or_out_of_memory(bytes, [&] {
    if (bytes < kHugeFrom) return allocate_small(bytes);
    std::shared_ptr<std::byte> memory = map_pages(bytes);
    const Topology& topology = machine_topology(Tuning::process().numa.count);
    if (topology.binds()) {
      std::vector<std::int32_t> ids;
      for (const NumaNode& node : topology.nodes) ids.push_back(node.id);
      place(memory.get(), bytes, Policy::Interleave, ids);  // only a wish, like huge pages
    }
    return memory;
  });
}

NodePages allocate_on_node(std::size_t bytes, std::int32_t id) {
  return or_out_of_memory(bytes, [&] {
    if (bytes < kHugePage) return NodePages{allocate_small(bytes), 0};
    NodePages pages{map_pages(bytes), 0};
    if (id >= 0) pages.error = place(pages.memory.get(), bytes, Policy::Preferred, {id});
    return pages;
  });
}

}  // namespace moesaic
