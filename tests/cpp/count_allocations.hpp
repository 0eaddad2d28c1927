#pragma once

/// Counts allocations of a test program. Include it in one source file only: it replaces operator
/// new.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace moesaic::test {

inline std::atomic<long> allocations{0};

/// Allocations while `body` runs.
template <class Body>
long count_allocations(Body&& body) {
  const long before = allocations.load();
  body();
  return allocations.load() - before;
}

inline void* counted(std::size_t bytes, std::size_t alignment) noexcept {
  ++allocations;
  if (bytes > PTRDIFF_MAX / 2) return nullptr;  // sanitizers end the program on such a request
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  return std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
}
inline void* counted_or_throw(std::size_t bytes, std::size_t alignment) {
  void* memory = counted(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace moesaic::test

// Not inlined: GCC takes an inlined free() for a mismatch with operator new.
#define MOESAIC_REPLACE [[gnu::noinline]]
MOESAIC_REPLACE void* operator new(std::size_t bytes) {
  return moesaic::test::counted_or_throw(bytes, alignof(std::max_align_t));
}
MOESAIC_REPLACE void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return moesaic::test::counted_or_throw(bytes, static_cast<std::size_t>(alignment));
}
MOESAIC_REPLACE void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return moesaic::test::counted(bytes, alignof(std::max_align_t));
}
MOESAIC_REPLACE void* operator new(std::size_t bytes, std::align_val_t alignment,
                                   const std::nothrow_t&) noexcept {
  return moesaic::test::counted(bytes, static_cast<std::size_t>(alignment));
}
MOESAIC_REPLACE void operator delete(void* memory) noexcept { std::free(memory); }
MOESAIC_REPLACE void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
MOESAIC_REPLACE void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
MOESAIC_REPLACE void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
#undef MOESAIC_REPLACE
