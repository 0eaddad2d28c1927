#include "launch.h"
#include "route/route.cuh"

namespace moesaic::cuda {
namespace {

template <int kWarps, int kPerLane>
int32_t launch_as(const op::Route& args, Stream stream) {
  constexpr int kTeams = kTeamsPerBlock<kWarps>;
  const auto blocks = static_cast<unsigned>((args.out.num_tokens + kTeams - 1) / kTeams);
  return dev::launch_dependent(route_kernel<kWarps, kPerLane>, dim3(blocks),
                               dim3(32 * kWarps * kTeams), 0, static_cast<dev::Stream>(stream),
                               args);
}

constexpr int kThreads = 256;

MOESAIC_KERNEL void shared_routing_kernel(op::SharedRouting args) {
  dev::begin_grid();
  const int64_t token = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= args.out.num_tokens) return;
  args.out.topk_ids[token] = 0;
  args.out.topk_weights[token] =
      args.logits == nullptr ? 1.0F : 1.0F / (1.0F + expf(-args.logits[token]));
}

}  // namespace

int32_t load_route_kernels() {
  return dev::load(route_kernel<1, 4>, route_kernel<1, 8>, route_kernel<1, 16>, route_kernel<8, 16>,
                   shared_routing_kernel);
}

int32_t launch_route(const op::Route& args, Stream stream) {
  if (args.out.num_tokens == 0) return kOk;
  const int32_t experts = args.num_experts;
  if (experts > kMaxExperts || args.top_k > kMaxTopK) return kUnsupported;
  if (experts <= 32 * 4) return launch_as<1, 4>(args, stream);
  if (experts <= 32 * 8) return launch_as<1, 8>(args, stream);
  if (experts <= 32 * 16) return launch_as<1, 16>(args, stream);
  static_assert(8 * 32 * 16 == kMaxExperts);
  return launch_as<8, 16>(args, stream);
}

int32_t launch_shared_routing(const op::SharedRouting& args, Stream stream) {
  if (args.out.num_tokens == 0) return kOk;
  const auto blocks = static_cast<unsigned>((args.out.num_tokens + kThreads - 1) / kThreads);
  return dev::launch_dependent(shared_routing_kernel, dim3(blocks), dim3(kThreads), 0,
                               static_cast<dev::Stream>(stream), args);
}

}  // namespace moesaic::cuda
