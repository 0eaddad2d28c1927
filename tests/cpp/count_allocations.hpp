#pragma once

/// Counts allocations of a test program. Include it in one source file only: it replaces malloc and
/// its kin where glibc lets us (operator new and std::vector ask it too), else operator new.
/// Sanitizers bring a malloc of their own.

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MOESAIC_COUNTS_MALLOC 1
#endif

namespace moesaic::test {

inline std::atomic<long> allocations{0};

/// Allocations while `body` runs.
template <class Body>
long count_allocations(Body&& body) {
  const long before = allocations.load();
  body();
  return allocations.load() - before;
}

}  // namespace moesaic::test

#if defined(MOESAIC_COUNTS_MALLOC)

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void* malloc(std::size_t n) noexcept {
  ++moesaic::test::allocations;
  return __libc_malloc(n);
}
void* calloc(std::size_t n, std::size_t size) noexcept {
  ++moesaic::test::allocations;
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t n) noexcept {
  ++moesaic::test::allocations;
  return __libc_realloc(p, n);
}
void* memalign(std::size_t alignment, std::size_t n) noexcept {
  ++moesaic::test::allocations;
  return __libc_memalign(alignment, n);
}
void* aligned_alloc(std::size_t alignment, std::size_t n) noexcept {
  ++moesaic::test::allocations;
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t n) noexcept {
  ++moesaic::test::allocations;
  *out = __libc_memalign(alignment, n);
  return *out != nullptr ? 0 : ENOMEM;
}
}

#else

namespace moesaic::test {

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

// Not inlined, because GCC takes an inlined free() for a mismatch with operator new.
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

#endif
