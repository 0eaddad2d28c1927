#include "launch.h"
#include "ops/activate.cuh"
#include "ops/combine.cuh"
#include "ops/gather.cuh"
#include "ops/identity.cuh"
#include "ops/look_up.cuh"
#include "ops/rms_norm.cuh"
#include "ops/router_logits.cuh"

namespace moesaic::cuda {
namespace {

/// Launches a kernel whose threads own four columns of a row.
template <class Args>
int32_t launch_rows(void (*kernel)(Args), int64_t rows, int64_t cols, const Args& args,
                    Stream stream) {
  if (rows == 0 || cols == 0) return kOk;
  return dev::launch_dependent(kernel, dim3(row_blocks(cols), grid_rows(rows)), dim3(kRowThreads),
                               0, static_cast<dev::Stream>(stream), args);
}

template <DType kType, int kTokens, int kExperts>
int32_t launch_logits(const op::RouterLogits& args, Stream stream) {
  const int64_t tiles =
      ((args.x.num_rows + kTokens - 1) / kTokens) * ((args.num_experts + kExperts - 1) / kExperts);
  const auto blocks = static_cast<unsigned>((tiles + kLogitWarps - 1) / kLogitWarps);
  return dev::launch_dependent(router_logits_kernel<kType, kTokens, kExperts>, dim3(blocks),
                               dim3(32 * kLogitWarps), 0, static_cast<dev::Stream>(stream), args);
}

constexpr int kFillThreads = 256;
constexpr int64_t kMaxFillBlocks = 4096;

MOESAIC_KERNEL void __launch_bounds__(kFillThreads) fill_kernel(op::Fill args) {
  dev::begin_grid();
  const int64_t step = int64_t{gridDim.x} * kFillThreads;
  const int64_t first = int64_t{blockIdx.x} * kFillThreads + threadIdx.x;
  auto* const bytes = static_cast<uint8_t*>(args.data);
  const uint8_t byte = args.value;
  // Up to 15 bytes before the first 16-byte boundary and behind the last, 16 at a time between.
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(bytes) % 16);
  int64_t head = misaligned == 0 ? 0 : 16 - misaligned;
  head = head < args.bytes ? head : args.bytes;
  const int64_t chunks = (args.bytes - head) / 16;
  const uint32_t word = byte * 0x01010101U;
  auto* const aligned = reinterpret_cast<uint4*>(bytes + head);
  for (int64_t i = first; i < chunks; i += step) aligned[i] = make_uint4(word, word, word, word);
  const int64_t tail = head + chunks * 16;
  if (first < head) bytes[first] = byte;
  if (first < args.bytes - tail) bytes[tail + first] = byte;
}

template <DType kType>
int32_t load_of_type() {
  return dev::load(router_logits_kernel<kType, 1, 1>, router_logits_kernel<kType, 8, 4>,
                   gather_kernel<kType>, rms_norm_kernel<kType>, add_identity_kernel<kType>,
                   combine_kernel<kType, DType::F32>, combine_kernel<kType, DType::F16>,
                   combine_kernel<kType, DType::BF16>);
}

}  // namespace

int32_t load_row_kernels() {
  int32_t error = load_of_type<DType::F32>();
  if (error == kOk) error = load_of_type<DType::F16>();
  if (error == kOk) error = load_of_type<DType::BF16>();
  if (error != kOk) return error;
  return dev::load(activate_kernel, look_up_experts_kernel, zero_skipped_kernel, fill_kernel);
}

int32_t launch_router_logits(const op::RouterLogits& args, Stream stream) {
  if (args.x.num_rows == 0) return kOk;
  return for_element_type(args.x.dtype, [&]<DType kType>() {
    // Few tokens: one dot product a warp, to fill the device.
    return args.x.num_rows <= 8 ? launch_logits<kType, 1, 1>(args, stream)
                                : launch_logits<kType, 8, 4>(args, stream);
  });
}

int32_t launch_gather(const op::Gather& args, Stream stream) {
  return for_element_type(args.x.dtype, [&]<DType kIn>() {
    return launch_rows(gather_kernel<kIn>, args.rows, args.x.cols, args, stream);
  });
}

int32_t launch_activate(const op::Activate& args, Stream stream) {
  return launch_rows(activate_kernel, args.rows, args.intermediate, args, stream);
}

int32_t launch_combine(const op::Combine& args, Stream stream) {
  return for_element_type(args.rows_dtype, [&]<DType kRows>() {
    return for_element_type(args.out.dtype, [&]<DType kOut>() {
      return launch_rows(combine_kernel<kRows, kOut>, args.routing.num_tokens, args.out.cols, args,
                         stream);
    });
  });
}

int32_t launch_look_up_experts(const op::LookUpExperts& args, Stream stream) {
  const int64_t blocks = (args.out.num_pairs() + kLookUpThreads - 1) / kLookUpThreads;
  return dev::launch_dependent(look_up_experts_kernel, dim3(static_cast<unsigned>(blocks)),
                               dim3(kLookUpThreads), 0, static_cast<dev::Stream>(stream), args);
}

int32_t launch_rms_norm(const op::RmsNorm& args, Stream stream) {
  return for_element_type(args.x.dtype, [&]<DType kType>() {
    return dev::launch_dependent(rms_norm_kernel<kType>,
                                 dim3(static_cast<unsigned>(args.x.num_rows)), dim3(kNormThreads),
                                 0, static_cast<dev::Stream>(stream), args);
  });
}

int32_t launch_add_identity(const op::AddIdentity& args, Stream stream) {
  return for_element_type(args.x.dtype, [&]<DType kType>() {
    return launch_rows(add_identity_kernel<kType>, args.x.num_rows, args.x.cols, args, stream);
  });
}

int32_t launch_zero_skipped(const op::ZeroSkipped& args, Stream stream) {
  return launch_rows(zero_skipped_kernel, args.rows, args.cols, args, stream);
}

int32_t launch_fill(const op::Fill& args, Stream stream) {
  if (args.bytes == 0) return kOk;
  const int64_t needed = (args.bytes + 16 * kFillThreads - 1) / (16 * kFillThreads);
  const auto blocks = static_cast<unsigned>(needed < kMaxFillBlocks ? needed : kMaxFillBlocks);
  return dev::launch_dependent(fill_kernel, dim3(blocks), dim3(kFillThreads), 0,
                               static_cast<dev::Stream>(stream), args);
}

}  // namespace moesaic::cuda
