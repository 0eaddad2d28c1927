// CUDA's scalar intrinsics, atomics and fences: each as its own manual entry defines it.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/qualifiers.hpp"

// --- bits

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __ffsll(long long x) {
  return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0;
}
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}

// Byte i of the result is byte (selector nibble i & 7) of high:low; bit 3 of the nibble replicates
// that byte's sign instead.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = selector >> (4 * i) & 15u;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xFFu;
    if (nibble & 8) byte = byte & 0x80u ? 0xFFu : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline int __float_as_int(float f) { return std::bit_cast<int>(f); }
inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
inline float __int_as_float(int i) { return std::bit_cast<float>(i); }

// --- arithmetic

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

#define MOESAIC_MIN_MAX(T)                         \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
MOESAIC_MIN_MAX(int)
MOESAIC_MIN_MAX(unsigned)
MOESAIC_MIN_MAX(long)
MOESAIC_MIN_MAX(unsigned long)
MOESAIC_MIN_MAX(long long)
MOESAIC_MIN_MAX(unsigned long long)
#undef MOESAIC_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// --- memory

#define MOESAIC_PLAIN_LOAD(name) \
  template <class T>             \
  T name(const T* address) {     \
    return *address;             \
  }
MOESAIC_PLAIN_LOAD(__ldg)
MOESAIC_PLAIN_LOAD(__ldcg)
MOESAIC_PLAIN_LOAD(__ldcs)
MOESAIC_PLAIN_LOAD(__ldca)
#undef MOESAIC_PLAIN_LOAD
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

inline void __threadfence() { moesaic::emulation::fence(); }
inline void __threadfence_block() { moesaic::emulation::fence(); }
inline void __nanosleep(unsigned, std::source_location where = std::source_location::current()) {
  moesaic::emulation::yield({"__nanosleep", where});
}
inline void __trap(std::source_location where = std::source_location::current()) {
  moesaic::emulation::fail("the kernel trapped", {"__trap", where});
}

// --- atomics: relaxed, as on the device; they return the old value

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_sub(value, std::memory_order_relaxed);
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_or(value, std::memory_order_relaxed);
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_and(value, std::memory_order_relaxed);
}
template <class T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_xor(value, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  std::atomic_ref<T> cell(*address);
  T old = cell.load(std::memory_order_relaxed);
  while (old < value && !cell.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  std::atomic_ref<T> cell(*address);
  T old = cell.load(std::memory_order_relaxed);
  while (value < old && !cell.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

// --- what device.cuh adds

namespace moesaic::dev {

template <int kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int bit = 0; bit < 32; bit++) {
    const uint32_t row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    result |= (static_cast<uint32_t>(kTable) >> row & 1) << bit;
  }
  return result;
}

inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

template <class T>
T load_weight(const T* global, std::source_location where = std::source_location::current()) {
  if (reinterpret_cast<std::uintptr_t>(global) % sizeof(T) != 0) {
    emulation::fail("a misaligned load", {"load_weight", where});
  }
  emulation::count_weight_bytes(sizeof(T));
  return *global;
}

inline uint4 load_weight16(const void* global,
                           std::source_location where = std::source_location::current()) {
  return load_weight(static_cast<const uint4*>(global), where);
}

// Several lanes read a scale, so that its bytes are not counted.
template <class T>
T load_scale(const T* global, std::source_location where = std::source_location::current()) {
  if (reinterpret_cast<uintptr_t>(global) % sizeof(T) != 0)
    emulation::fail("a misaligned load", {"load_scale", where});
  return *global;
}

inline void griddepcontrol_wait() { emulation::grid_wait(); }
inline void griddepcontrol_launch() {}

}  // namespace moesaic::dev
