// The only door between a kernel and the machine it runs on.
//
// Kernels use the standard CUDA spellings (threadIdx, __syncthreads, __shfl_xor_sync, atomicAdd,
// ...) and the wrappers of namespace moesaic::dev. Under nvcc these are PTX; compiled as plain C++
// they are the emulator of tests/emulation, where each GPU thread is a fiber. Kernels therefore
// contain no inline assembly, no __CUDA_ARCH__ and no bare __shared__.
//
//   macros        MOESAIC_KERNEL, MOESAIC_DEV, MOESAIC_UNROLL,
//                 MOESAIC_SHARED(T, name, [N]...), MOESAIC_DYN_SHARED(T, name)
//   tensor cores  mma_m16n8k16_bf16, mma_m16n8k16_f16, mma_m16n8k8_bf16,
//                 ldmatrix_x2, _x4, _x2_trans, _x4_trans
//   copies        cp_async16, cp_async_weight16, cp_async_commit, cp_async_wait<N>
//   barriers      mbarrier_init, _arrive, _arrive_after_copies, _wait
//   loads         load_weight16, load_weight<T>, load_scale<T>
//   bits          lop3<LUT>, prmt
//   16-bit        f32_to_bf16, bf16_to_f32, pack_bf16, unpack_bf16, and likewise for f16;
//                 bf16x2_add, bf16x2_fma
//   grids         griddepcontrol_wait, griddepcontrol_launch, begin_grid, launch,
//                 launch_dependent, load
#pragma once

#if defined(__CUDACC__)
#include "device/launch.cuh"
#include "device/ptx.cuh"
#else
#include "cuda/device.hpp"  // tests/emulation, on the include path of the emulated build
#endif

namespace moesaic::dev {

// The first statement of a kernel that is launched as a dependent: its blocks stand ready while the
// predecessor ends, and those of the successor stand ready behind it. A successor is let in after
// the wait, so that its wait covers all grids before.
MOESAIC_DEV void begin_grid() {
  griddepcontrol_wait();
  griddepcontrol_launch();
}

}  // namespace moesaic::dev
