// The wrappers of device.cuh for nvcc: one PTX instruction each. Instruction names and operand
// orders follow the PTX ISA manual; sm_80 is the oldest target.
#pragma once

#include <cstddef>
#include <cstdint>

#define MOESAIC_KERNEL __global__
#define MOESAIC_DEV __device__ __forceinline__
#define MOESAIC_UNROLL _Pragma("unroll")
#define MOESAIC_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// One array for all dynamic memory of a block; 1024 is the largest alignment any swizzle asks for.
#define MOESAIC_DYN_SHARED(T, name)                                         \
  extern __shared__ __align__(1024) unsigned char moesaic_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(moesaic_dynamic_shared)

namespace moesaic::dev {

MOESAIC_DEV uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- tensor cores: d[16x8] += a[16x16] * b[16x8], f32 accumulators

MOESAIC_DEV void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

MOESAIC_DEV void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16x8] += a[16x8] * b[8x8]
MOESAIC_DEV void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Lane i passes the address of row i % 8 of 8x8 matrix i / 8; rows are 16 bytes, 16-byte aligned.

MOESAIC_DEV void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

MOESAIC_DEV void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

MOESAIC_DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

MOESAIC_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- asynchronous copies, global to shared, 16 bytes

MOESAIC_DEV void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
// Weights are read once per launch: they leave L2 first, so that activations stay.
MOESAIC_DEV uint64_t evict_first_policy() {
#if __CUDA_ARCH__ >= 900
  // What createpolicy gives, as a constant: it takes no registers of a lane.
  return 0x12F0000000000000ULL;
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}

MOESAIC_DEV void cp_async_weight16(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "l"(evict_first_policy())
      : "memory");
}

MOESAIC_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most N of this thread's groups are in flight.
template <int N>
MOESAIC_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- barriers in shared memory

MOESAIC_DEV void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

MOESAIC_DEV void mbarrier_arrive(uint64_t* barrier) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
      : "memory");
}

// Arrives when all copies this thread issued so far have landed (one of the counted arrivals).
MOESAIC_DEV void mbarrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Waits for the end of the phase of this parity; the first phase has parity 0.
MOESAIC_DEV void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done;\n"
      "again_%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again_%=; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred done;\n"
      "again_%=: mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again_%=; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// --- loads that do not stay in L1

MOESAIC_DEV uint4 load_weight16(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(global)), "l"(evict_first_policy()));
  return v;
}

// A smaller piece of a weight (scales, high bits): 1, 2, 4, 8 or 16 bytes, naturally aligned.
template <class T>
MOESAIC_DEV T load_weight(const T* global) {
  return __ldcs(global);
}

// Scales, which the lanes and warps of a block share: 2, 4, 8 or 16 bytes, naturally aligned.
template <class T>
MOESAIC_DEV T load_scale(const T* global) {
  return __ldg(global);
}

// --- bits

template <int kTable>
MOESAIC_DEV uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

MOESAIC_DEV uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// --- 16-bit floats as bit patterns; pairs hold the first value in the low half

MOESAIC_DEV float bf16_to_f32(uint16_t h) {
  return __uint_as_float(static_cast<uint32_t>(h) << 16);
}

MOESAIC_DEV uint16_t f32_to_bf16(float f) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

MOESAIC_DEV float f16_to_f32(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

MOESAIC_DEV uint16_t f32_to_f16(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

MOESAIC_DEV uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

MOESAIC_DEV uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

MOESAIC_DEV float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

MOESAIC_DEV float2 unpack_f16(uint32_t pair) {
  return make_float2(f16_to_f32(static_cast<uint16_t>(pair)),
                     f16_to_f32(static_cast<uint16_t>(pair >> 16)));
}

MOESAIC_DEV uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// sm_80 has only the fused form for bf16; a multiplication by one is exact.
MOESAIC_DEV uint32_t bf16x2_add(uint32_t a, uint32_t b) { return bf16x2_fma(a, 0x3F803F80u, b); }

// --- programmatic dependent launch: no-ops before sm_90

// Blocks until the grids this one depends on have finished and their writes are visible.
MOESAIC_DEV void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the dependent grid start once every block has said so.
MOESAIC_DEV void griddepcontrol_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moesaic::dev
