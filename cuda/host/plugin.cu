/// libmoesaic_cuda.so: the table with the CUDA runtime behind it. No STL, no exceptions: what
/// leaves this file is C.

#include <cuda_runtime.h>

#include "launch.h"

#define MOESAIC_TEXT(x) #x
#define MOESAIC_TEXT_OF(x) MOESAIC_TEXT(x)

namespace moesaic::cuda {
namespace {

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }

const char* error_text(int32_t error) {
  switch (error) {
    case kUnsupported:
      return "no kernel for these arguments";
    case kBadArguments:
      return "arguments that contradict each other";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

/// Errors of one call must not show up at the next.
int32_t result(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int32_t>(error);
}

int32_t device_count(int32_t* count) { return result(cudaGetDeviceCount(count)); }

int32_t device_properties(int32_t device, DeviceProperties* out) {
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return result(error);
  for (int i = 0; i < 256; ++i) out->name[i] = properties.name[i];
  out->name[255] = '\0';
  out->arch = properties.major * 10 + properties.minor;
  out->num_sms = properties.multiProcessorCount;
  out->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  out->l2_bytes = properties.l2CacheSize;
  error = cudaDriverGetVersion(&out->driver_version);
  if (error == cudaSuccess) error = cudaRuntimeGetVersion(&out->runtime_version);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&out->clock_khz, cudaDevAttrClockRate, device);
  }
  return result(error);
}

int32_t set_device(int32_t device, int32_t* previous) {
  const cudaError_t error = cudaGetDevice(previous);
  if (error != cudaSuccess || *previous == device) return result(error);
  return result(cudaSetDevice(device));
}

int32_t allocate(int64_t bytes, void** memory) {
  return result(cudaMalloc(memory, static_cast<size_t>(bytes)));
}

int32_t deallocate(void* memory) { return result(cudaFree(memory)); }

int32_t copy(void* to, const void* from, int64_t bytes, Stream stream) {
  return result(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_of(stream)));
}

int32_t synchronize(Stream stream) { return result(cudaStreamSynchronize(stream_of(stream))); }

int32_t is_capturing(Stream stream, int32_t* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream_of(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return result(error);
}

Table make_table() {
  Table table = {};
  fill_operations(table);
  table.build = "CUDA " MOESAIC_TEXT_OF(__CUDACC_VER_MAJOR__) "." MOESAIC_TEXT_OF(
      __CUDACC_VER_MINOR__) ", " MOESAIC_CUDA_ARCHITECTURES;
  table.error_text = error_text;
  table.device_count = device_count;
  table.device_properties = device_properties;
  table.set_device = set_device;
  table.allocate = allocate;
  table.deallocate = deallocate;
  table.copy = copy;
  table.synchronize = synchronize;
  table.is_capturing = is_capturing;
  return table;
}

}  // namespace
}  // namespace moesaic::cuda

extern "C" __attribute__((visibility("default"))) const moesaic::cuda::Table* moesaic_cuda_plugin(
    void) {
  static const moesaic::cuda::Table table = moesaic::cuda::make_table();
  return &table;
}
