// Launching a kernel from host code compiled by nvcc.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace moesaic::dev {

using Stream = cudaStream_t;

namespace detail {

// A kernel that wants more dynamic shared memory than this must ask for it.
inline constexpr std::size_t kDefaultDynamicShared = 48 * 1024;

template <class... Params>
int launch_with(cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(Params...),
                dim3 grid, dim3 block, std::size_t dynamic_shared, Stream stream, Params... args) {
  if (dynamic_shared > kDefaultDynamicShared) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(dynamic_shared));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace detail

// Loads each kernel, which else happens at its first launch; returns a cudaError_t as int.
template <class... Kernels>
int load(Kernels... kernels) {
  cudaError_t status = cudaSuccess;
  cudaFuncAttributes ignored;
  ((status = status != cudaSuccess
                 ? status
                 : cudaFuncGetAttributes(&ignored, reinterpret_cast<const void*>(kernels))),
   ...);
  return status;
}

// Launches `kernel`; returns a cudaError_t as int, 0 on success. An empty grid is a success.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_shared,
           Stream stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  return detail::launch_with<Params...>(nullptr, 0, kernel, grid, block, dynamic_shared, stream,
                                        static_cast<Params>(args)...);
}

// Devices before sm_90 know no such launches, and drivers before CUDA 12.3 record none into a graph:
// there a grid follows the one before.
inline bool has_dependent_launches() {
  int driver = 0, device = 0, major = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
         cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

// Launches a grid that may start before its predecessor in the stream has ended: every thread of the
// kernel must call griddepcontrol_wait() before its first dependent read and before its first global
// write, and before it ends.
template <class... Params, class... Args>
int launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_shared,
                     Stream stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const unsigned attributes = has_dependent_launches() ? 1 : 0;
  return detail::launch_with<Params...>(&attribute, attributes, kernel, grid, block, dynamic_shared,
                                        stream, static_cast<Params>(args)...);
}

}  // namespace moesaic::dev
