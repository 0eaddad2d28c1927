#pragma once

/// The expert products of the CPU backend: panels, quantised activations, schedules.

#include <cstddef>
#include <string>
#include <vector>

#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {

Support supports(const WeightRef& weight);
std::vector<KernelInfo> kernels();
std::string kernel_name(const WeightRef& weight, const Tuning& tuning);

/// Repacks each role into panels in huge pages (StackLayout::Auto), or leaves it as stored (File).
/// Parallel over options.pool, reports progress, records decisions in parts.report.
void prepare(ExpertStack::Parts& parts, const LoadOptions& options);

std::size_t scratch_bytes(const ScratchQuery& query);
void expert_gemm(Context& context, const GemmCall& call);
void gate_up(Context& context, const GateUpCall& call);
void down(Context& context, const DownCall& call);

}  // namespace moesaic::cpu
