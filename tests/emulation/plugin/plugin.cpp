// The plug-in of a GPU that is the emulator: the same symbol, table and kernels, memory of the
// host. With it (and an empty libcuda.so.1) the whole way from Python to a kernel runs without a
// GPU.

#include "emulated_gpu.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const moesaic::cuda::Table* moesaic_cuda_plugin(void) {
  return &moesaic::testing::EmulatedGpu::get().table();
}

/// Memory of the GPU for an array package that a test makes up; never freed.
EXPORTED void* emulated_gpu_allocate(std::size_t bytes) {
  void* memory = nullptr;
  moesaic_cuda_plugin()->allocate(static_cast<std::int64_t>(bytes), &memory);
  return memory;
}
