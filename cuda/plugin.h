#pragma once

/// The border between the core and libmoesaic_cuda.so: one function table of plain C types and of
/// the operations that every backend knows (moesaic/operations.hpp), so that the core needs no CUDA
/// headers and the plug-in no part of the core but plain headers. The emulator fills the same table
/// (tests/emulation). All pointers of an operation are device memory; `stream` is a cudaStream_t.
/// Functions give 0 or an error number that Table::error_text explains.
///
/// Launchers neither allocate, copy, synchronise nor read device memory on the host: a call can be
/// captured into a graph, and all sizes of its launches follow from the arguments.

#include <stdint.h>

#include "moesaic/operations.hpp"

namespace moesaic::cuda {

/// Raised with every change of an operation or of the table.
inline constexpr int32_t kPluginVersion = 4;

using Stream = void*;

/// Limits of the kernels, checked before a launch.
inline constexpr int32_t kMaxExperts = 4096;
inline constexpr int32_t kMaxTopK = 64;

/// Error numbers of this library; positive ones are the driver's.
inline constexpr int32_t kOk = 0;
inline constexpr int32_t kUnsupported = -1;   ///< no kernel for these arguments
inline constexpr int32_t kBadArguments = -2;  ///< they contradict each other; a bug of the caller

/// Sizes that the scratch of a phase depends on: the larger of both phases.
struct GemmSizes {
  int64_t num_rows;  ///< output rows
  int64_t num_in;    ///< input rows
  int64_t cols;      ///< input features, packed
  int64_t out_cols;  ///< output features
  int32_t num_experts;
  bool separate;  ///< gate and up do not share units, so a phase may need room for one
};

/// One kernel, for info, explain, tests and bench. Text lives as long as the table.
struct KernelRow {
  const char* operation;  ///< "expert_gemm", "gate_up", "down"
  const char* name;       ///< mechanical: gate_up_q4_k_mma
  QuantType type;
  int32_t min_arch;  ///< 80, 90
};

// ------------------------------------------------------------------------------------ table ----

struct DeviceProperties {
  char name[256];
  int32_t arch;  ///< 80, 90, ...
  int32_t num_sms;
  int64_t memory_bytes;
  int64_t l2_bytes;
  int32_t driver_version;   ///< as cuDriverGetVersion: 13000
  int32_t runtime_version;  ///< the plug-in's own
  int32_t clock_khz;
  int32_t reserved;
};

struct Table {
  int32_t version;      ///< kPluginVersion
  int32_t table_bytes;  ///< sizeof(Table)
  const char* build;    ///< "CUDA 13.0, sm_80 sm_90a"

  // Host functions. Those from `allocate` on, and the operations, work on the device that was
  // entered.
  const char* (*error_text)(int32_t error);
  /// Whether every later call of this process on the device will fail with this error too.
  bool (*is_sticky)(int32_t error);
  int32_t (*device_count)(int32_t* count);
  int32_t (*device_properties)(int32_t device, DeviceProperties* properties);
  /// Makes the device the thread's current one, and creates its context and no other. `previous` is
  /// the context that was current, null for none; leave_device makes it current again.
  int32_t (*enter_device)(int32_t device, void** previous);
  int32_t (*leave_device)(void* previous);
  /// While another thread records a graph, the next three neither fail nor end its recording.
  int32_t (*allocate)(int64_t bytes, void** memory);
  int32_t (*deallocate)(void* memory);
  /// From host memory to an allocation that nothing reads yet; complete when it returns.
  int32_t (*upload)(void* to, const void* from, int64_t bytes);
  /// Between any two of host and device, ordered on the stream.
  int32_t (*copy)(void* to, const void* from, int64_t bytes, Stream stream);
  int32_t (*synchronize)(Stream stream);
  int32_t (*is_capturing)(Stream stream, int32_t* capturing);

  // The driver loads a kernel at its first launch, which cannot be recorded into a graph: these load
  // them before.
  int32_t (*load_operations)(void);
  /// The kernels that products with this weight can run.
  int32_t (*load_products)(const WeightRef*);

  // Sizes.
  int64_t (*plan_scratch_bytes)(int64_t num_pairs, int32_t num_experts);
  int64_t (*gemm_scratch_bytes)(const GemmSizes*);

  // Operations. A kernel reads what an operation calls host values from the device.
  int32_t (*router_logits)(const op::RouterLogits*, Stream);
  int32_t (*route)(const op::Route*, Stream);
  int32_t (*look_up_experts)(const op::LookUpExperts*, Stream);
  int32_t (*shared_routing)(const op::SharedRouting*, Stream);
  int32_t (*bucket_plan)(const op::BucketPlan*, Stream);
  int32_t (*align)(const op::Align*, Stream);
  int32_t (*gather)(const op::Gather*, Stream);
  int32_t (*activate)(const op::Activate*, Stream);
  int32_t (*combine)(const op::Combine*, Stream);
  int32_t (*rms_norm)(const op::RmsNorm*, Stream);
  int32_t (*add_identity)(const op::AddIdentity*, Stream);
  int32_t (*zero_skipped)(const op::ZeroSkipped*, Stream);
  int32_t (*fill)(const op::Fill*, Stream);
  int32_t (*gemm)(const op::Gemm*, Stream);
  int32_t (*gate_up)(const op::GateUp*, Stream);
  int32_t (*down)(const op::Down*, Stream);

  // Kernels by name.
  const KernelRow* kernels;
  int32_t num_kernels;
  int32_t reserved;
  /// The kernel that `gemm` would run, null where none can.
  const char* (*gemm_name)(const WeightRef*);
  /// The kernel that `down` would run, for pairs that are sorted by expert or each a segment of its
  /// own.
  const char* (*down_name)(const WeightRef*, int64_t num_pairs, bool sorted);
};

}  // namespace moesaic::cuda

/// The one symbol of the plug-in.
extern "C" const moesaic::cuda::Table* moesaic_cuda_plugin(void);
