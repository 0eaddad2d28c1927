/// libmoesaic_cuda.so: the table with the CUDA runtime behind it. No STL, no exceptions: what
/// leaves this file is C.

#include <cuda.h>
#include <cuda_runtime.h>

#include "launch.h"

#define MOESAIC_TEXT(x) #x
#define MOESAIC_TEXT_OF(x) MOESAIC_TEXT(x)
// The driver of each toolkit's first minor version serves the later ones too.
#if __CUDACC_VER_MAJOR__ >= 13
#define MOESAIC_MIN_DRIVER "580"
#else
#define MOESAIC_MIN_DRIVER "525"
#endif

namespace moesaic::cuda {
namespace {

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }

const char* error_text(int32_t error) {
  switch (error) {
    case kUnsupported:
      return "no kernel for these arguments";
    case kBadArguments:
      return "arguments that contradict each other";
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver is too old: CUDA " MOESAIC_TEXT_OF(
          __CUDACC_VER_MAJOR__) " needs version " MOESAIC_MIN_DRIVER " or later";
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

/// Errors after which the context, which all of a process shares, is lost.
bool is_sticky(int32_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorContextIsDestroyed:
      return true;
    default:
      return false;
  }
}

/// A function of the driver, which is not linked.
template <class Function>
Function driver_function(const char* name) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kVersion = 12000;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess ? reinterpret_cast<Function>(address) : nullptr;
}

// The runtime would say that device 0 is current where none is, and going back to that would create
// a context there; the driver knows the difference.
int32_t enter_device(int32_t device, void** previous) {
  static const auto get_current = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  CUcontext current = nullptr;
  if (get_current == nullptr || get_current(&current) != CUDA_SUCCESS) current = nullptr;
  *previous = current;
  int now = -1;
  if (current != nullptr && cudaGetDevice(&now) == cudaSuccess && now == device) return kOk;
  return result(cudaSetDevice(device));
}

int32_t leave_device(void* previous) {
  static const auto get_current = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  static const auto set_current = driver_function<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
  CUcontext current = nullptr;
  if (get_current == nullptr || set_current == nullptr) return cudaErrorInsufficientDriver;
  if (get_current(&current) == CUDA_SUCCESS && current == previous) return kOk;
  return set_current(static_cast<CUcontext>(previous)) == CUDA_SUCCESS ? kOk
                                                                       : cudaErrorInvalidValue;
}

/// What the thread does while alive is no part of any recording, and ends none: a recording of
/// another thread forbids allocations in all others that do not say so.
class OutsideRecordings {
 public:
  OutsideRecordings() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideRecordings() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideRecordings(const OutsideRecordings&) = delete;
  OutsideRecordings& operator=(const OutsideRecordings&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int32_t allocate(int64_t bytes, void** memory) {
  const OutsideRecordings outside;
  return result(cudaMalloc(memory, static_cast<size_t>(bytes)));
}

int32_t deallocate(void* memory) {
  const OutsideRecordings outside;
  return result(cudaFree(memory));
}

/// On a stream that waits for no other: any use of the legacy default stream would end recordings.
int32_t upload(void* to, const void* from, int64_t bytes) {
  const OutsideRecordings outside;
  cudaStream_t stream;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return result(error);
  error = cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return result(error);
}

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
  table.is_sticky = is_sticky;
  table.enter_device = enter_device;
  table.leave_device = leave_device;
  table.allocate = allocate;
  table.deallocate = deallocate;
  table.upload = upload;
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
