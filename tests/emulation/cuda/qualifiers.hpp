// CUDA's qualifiers, built-in variables and vector types.
#pragma once

#include "runtime/emulator.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define MOESAIC_KERNEL
#define MOESAIC_DEV inline
#define MOESAIC_UNROLL
// The static tag is one object per instantiation of the kernel, so its address names the array.
#define MOESAIC_SHARED(T, name, ...)                                                  \
  using name##_shared_type = T __VA_ARGS__;                                           \
  static const char name##_shared_tag = 0;                                            \
  auto& name = *static_cast<name##_shared_type*>(::moesaic::emulation::static_shared( \
      &name##_shared_tag, sizeof(name##_shared_type), alignof(name##_shared_type)))
#define MOESAIC_DYN_SHARED(T, name) \
  T* const name = static_cast<T*>(::moesaic::emulation::dynamic_shared())

using dim3 = moesaic::emulation::Dim3;
inline constexpr const dim3& threadIdx = moesaic::emulation::position.thread;
inline constexpr const dim3& blockIdx = moesaic::emulation::position.block;
inline constexpr const dim3& blockDim = moesaic::emulation::position.block_size;
inline constexpr const dim3& gridDim = moesaic::emulation::position.grid_size;
inline constexpr int warpSize = 32;

#define MOESAIC_VECTOR_TYPES(T, name, align2, align4)                \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
MOESAIC_VECTOR_TYPES(signed char, char, 2, 4)
MOESAIC_VECTOR_TYPES(unsigned char, uchar, 2, 4)
MOESAIC_VECTOR_TYPES(short, short, 4, 8)
MOESAIC_VECTOR_TYPES(unsigned short, ushort, 4, 8)
MOESAIC_VECTOR_TYPES(int, int, 8, 16)
MOESAIC_VECTOR_TYPES(unsigned, uint, 8, 16)
MOESAIC_VECTOR_TYPES(float, float, 8, 16)
#undef MOESAIC_VECTOR_TYPES
