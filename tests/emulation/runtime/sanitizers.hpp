// The sanitizers' run-time entry points, null when the program is built without them.
#pragma once

#include <cstddef>

extern "C" {
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __tsan_ignore_thread_begin();
__attribute__((weak)) void __tsan_ignore_thread_end();
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack_save,
                                                          const void* bottom, std::size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack_save,
                                                           const void** bottom_old,
                                                           std::size_t* size_old);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address,
                                                       std::size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address,
                                                         std::size_t size);
}

namespace moesaic::emulation {

inline bool race_checked() { return __tsan_create_fiber != nullptr; }

// Happens-before edges: what was done before release(a) is visible after acquire(a).
inline void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}
inline void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

// The emulator's own bookkeeping is not the kernel's traffic. Its code is compiled without the race
// checker, but the library calls it makes (memset, malloc) are intercepted all the same. A scope
// must not stay open across a switch: the mark belongs to a fiber.
class Unseen {
 public:
  Unseen() {
    if (__tsan_ignore_thread_begin) __tsan_ignore_thread_begin();
  }
  ~Unseen() {
    if (__tsan_ignore_thread_end) __tsan_ignore_thread_end();
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// Inside an Unseen scope: back in sight.
class Seen {
 public:
  Seen() {
    if (__tsan_ignore_thread_end) __tsan_ignore_thread_end();
  }
  ~Seen() {
    if (__tsan_ignore_thread_begin) __tsan_ignore_thread_begin();
  }
  Seen(const Seen&) = delete;
  Seen& operator=(const Seen&) = delete;
};

inline void poison(const void* address, std::size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(address, bytes);
}
inline void unpoison(const void* address, std::size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(address, bytes);
}

}  // namespace moesaic::emulation
