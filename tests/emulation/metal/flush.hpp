#pragma once

/// Arithmetic as on an Apple GPU: subnormal f32 numbers count as 0, as operands and as results. Loads
/// and stores keep their bits, and f16 has subnormal numbers.

#include <cstdint>

namespace moesaic::emulation {

/// Flushes on the calling thread while alive.
class FlushedSubnormals {
 public:
  FlushedSubnormals() : before_(control()) { set_control(before_ | kFlush); }
  ~FlushedSubnormals() { set_control(before_); }
  FlushedSubnormals(const FlushedSubnormals&) = delete;
  FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  using Word = std::uint32_t;
  static constexpr Word kFlush = 0x8040;  // results (FTZ) and operands (DAZ)
  static Word control() { return __builtin_ia32_stmxcsr(); }
  static void set_control(Word word) { __builtin_ia32_ldmxcsr(word); }
#elif defined(__aarch64__)
  using Word = std::uint64_t;
  static constexpr Word kFlush = Word{1} << 24;  // FZ: both
  static Word control() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set_control(Word word) { asm volatile("msr fpcr, %0" ::"r"(word)); }
#else
#error "How this processor flushes subnormal numbers is not written yet."
#endif
  Word before_;
};

}  // namespace moesaic::emulation
