#include "runtime/fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "runtime/sanitizers.hpp"

// emulation_switch(save, load): pushes the callee-saved registers, stores the stack pointer in
// *save, takes `load` as the stack pointer and pops. A new fiber's stack is laid out as if it had
// been switched away from at the entry of emulation_boot, with the function and its argument in
// registers. (ucontext would do a system call per switch.)
extern "C" {
void emulation_switch(void** save, void* load);
void emulation_boot();
}

#if defined(__x86_64__)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
.globl emulation_boot
.hidden emulation_boot
.type emulation_boot,@function
emulation_boot:
  .cfi_startproc
  .cfi_undefined rip
  movq %r12, %rdi
  callq *%r13
  ud2
  .cfi_endproc
.size emulation_boot,.-emulation_boot
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch,%function
emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulation_switch,.-emulation_switch
.globl emulation_boot
.hidden emulation_boot
.type emulation_boot,%function
emulation_boot:
  .cfi_startproc
  .cfi_undefined x30
  mov x0, x19
  blr x20
  brk #0
  .cfi_endproc
.size emulation_boot,.-emulation_boot
)");
#else
#error "The emulator switches stacks in assembly: x86-64 and aarch64 are written."
#endif

namespace moesaic::emulation {
namespace {

std::size_t page() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

constexpr unsigned kSwitchWithoutOrder = 1;  // TSan: a switch is no happens-before edge

void* first_frame(char* top, void (*function)(void*), void* argument) {
  void** frame = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  frame -= 2;  // the call in emulation_boot starts from a 16-byte boundary
  frame[0] = frame[1] = nullptr;
  *--frame = reinterpret_cast<void*>(&emulation_boot);
  frame -= 6;  // r15 r14 r13 r12 rbx rbp
  std::memset(frame, 0, 6 * sizeof(void*));
  frame[2] = reinterpret_cast<void*>(function);
  frame[3] = argument;
#else
  frame -= 20;
  std::memset(frame, 0, 20 * sizeof(void*));
  frame[0] = argument;                           // x19
  frame[1] = reinterpret_cast<void*>(function);  // x20
  frame[11] = reinterpret_cast<void*>(&emulation_boot);
#endif
  return frame;
}

// To TSan all that a thread has seen comes before the threads it makes. This one sees nothing of what
// launches do.
void* new_checker() {
  static void* const maker = __tsan_create_fiber(0);
  void* const scheduler = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(maker, kSwitchWithoutOrder);
  void* const made = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(scheduler, kSwitchWithoutOrder);
  return made;
}

}  // namespace

PlacePool::~PlacePool() {
  for (const Place& place : clean_) munmap(place.stack - page(), kStackBytes + page());
  for (const Place& place : resting_) munmap(place.stack - page(), kStackBytes + page());
  for (const Place& place : used_) munmap(place.stack - page(), kStackBytes + page());
}

void PlacePool::begin_launch() {
  clean_.insert(clean_.end(), resting_.begin(), resting_.end());
  resting_.swap(used_);
  used_.clear();
}

Place PlacePool::make() {
  void* memory = mmap(nullptr, kStackBytes + page(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page(), PROT_NONE);
  made_++;
  return {static_cast<char*>(memory) + page(), race_checked() ? new_checker() : nullptr};
}

Place PlacePool::take() {
  constexpr std::size_t kMaxPlaces = 2048;  // TSan has some 8000 threads
  Place place;
  if (!clean_.empty()) {
    place = clean_.back();
    clean_.pop_back();
  } else if (made_ < kMaxPlaces || used_.empty()) {
    place = make();
  } else {
    place = used_.front();
    used_.pop_front();
    __tsan_destroy_fiber(place.checker);
    place.checker = new_checker();
    // A mapping over the old one makes TSan forget who touched it.
    mmap(place.stack, kStackBytes, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
  unpoison(place.stack, kStackBytes);  // an abandoned fiber leaves its frames poisoned
  return place;
}

void PlacePool::give_back(Place place) {
  if (race_checked()) {
    used_.push_back(place);
  } else {
    clean_.push_back(place);
  }
}

void Fiber::start(Place place, std::size_t colour, void (*entry)(void*), void* argument) {
  place_ = place;
  entry_ = entry;
  argument_ = argument;
  own_fake_stack_ = nullptr;
  stack_pointer_ = first_frame(place.stack + PlacePool::kStackBytes - 64 - colour % 64 * 320,
                               &Fiber::enter, this);
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&fake_stack, place_.stack, PlacePool::kStackBytes);
  }
  if (race_checked()) {
    scheduler_checker_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(place_.checker, kSwitchWithoutOrder);
  }
  emulation_switch(&scheduler_pointer_, stack_pointer_);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }
}

void Fiber::leave(bool for_good) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &own_fake_stack_, scheduler_stack_,
                                   scheduler_stack_bytes_);
  }
  if (race_checked()) __tsan_switch_to_fiber(scheduler_checker_, kSwitchWithoutOrder);
  emulation_switch(&stack_pointer_, scheduler_pointer_);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(own_fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
  }
}

void Fiber::suspend() { leave(false); }

void Fiber::finish() {
  leave(true);
  __builtin_unreachable();
}

Place Fiber::retire(void* clock) {
  if (place_.checker) {
    void* scheduler = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(place_.checker, kSwitchWithoutOrder);
    release(clock);
    __tsan_switch_to_fiber(scheduler, kSwitchWithoutOrder);
  }
  return std::exchange(place_, {});
}

void Fiber::enter(void* self) {
  Fiber& fiber = *static_cast<Fiber*>(self);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &fiber.scheduler_stack_,
                                    &fiber.scheduler_stack_bytes_);
  }
  fiber.entry_(fiber.argument_);
  fiber.finish();
}

}  // namespace moesaic::emulation
