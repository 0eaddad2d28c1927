#include "cpu/dispatch.hpp"

#include <string>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "cpu/isa.hpp"
#include "cpu/kernels/activations.hpp"

namespace moesaic::cpu {
namespace {

struct Format {
  QuantType type;
  const char* name;
};
constexpr Format kFormats[] = {
#define MOESAIC_KERNEL(TYPE, NAME) {QuantType::TYPE, #NAME},
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
    {QuantType::INT4, "int4"},
};

const Format* find_format(QuantType type) {
  for (const Format& format : kFormats) {
    if (format.type == type) return &format;
  }
  return nullptr;
}

/// For example "gemm_q4_k_avx512vnni", or "gemm_q4_k_rows_avx512vnni" for the row layout. "amx" names
/// what experts with enough tokens run (TileKernels::min_tokens); those with fewer, and formats
/// without tiles, run avx512vnni's.
std::string mechanical_name(const Format& format, WeightLayout layout, CpuIsa isa) {
  return std::string("gemm_") + format.name + (layout == WeightLayout::Rows ? "_rows_" : "_") +
         name_of(isa);
}

#ifdef MOESAIC_HAVE_AMX
/// Tiles beside the vectors of AVX-512.
const IsaKernels& amx_kernels() {
  static const IsaKernels kernels = [] {
    IsaKernels k = avx512vnni::kKernels;
    k.tiles = &amx::kTiles;
    return k;
  }();
  return kernels;
}
#endif

/// Whether `isa` has kernels of its own for `type`.
bool has_own(CpuIsa isa, QuantType type) {
  const IsaKernels& kernels = kernels_of(isa);
  return kernels.tiles == nullptr || kernels.tiles->gemm[static_cast<int>(type)] != nullptr;
}

}  // namespace

const IsaKernels& kernels_of(CpuIsa isa) {
  switch (isa) {
#ifdef MOESAIC_HAVE_AVX2
    case CpuIsa::Avx2:
      return avx2::kKernels;
#endif
#ifdef MOESAIC_HAVE_AVXVNNI
    case CpuIsa::AvxVnni:
      return avxvnni::kKernels;
#endif
#ifdef MOESAIC_HAVE_AVX512VNNI
    case CpuIsa::Avx512Vnni:
      return avx512vnni::kKernels;
#endif
#ifdef MOESAIC_HAVE_AMX
    case CpuIsa::Amx:
      return amx_kernels();
#endif
#ifdef MOESAIC_HAVE_NEON
    case CpuIsa::Neon:
      return neon::kKernels;
#endif
    default:
      return scalar::kKernels;
  }
}

int planes_of(QuantType type, Precision precision) noexcept {
  const bool is_float = type == QuantType::F32 || type == QuantType::F16 ||
                        type == QuantType::BF16 || type == QuantType::E4M3;
  if (is_float) return 0;
  return precision == Precision::Fast ? 1 : 2;
}

std::int64_t activation_bytes(std::int64_t cols, int planes) noexcept {
  return act_token_bytes(cols, planes);
}

Support CpuBackend::supports(const WeightRef& weight) const {
  if (weight.layout == WeightLayout::CudaUnits) {
    return {.ok = false, .reason = "the weights are on a CUDA device"};
  }
  if (weight.type == QuantType::INT4 && weight.layout != WeightLayout::Panels) {
    return {.ok = false, .reason = "INT4 groups exist in panels only"};
  }
  if (find_format(weight.type) != nullptr) return {};
  return {.ok = false, .reason = "no CPU kernel multiplies this type"};
}

std::vector<KernelInfo> CpuBackend::kernels() const {
  std::vector<KernelInfo> list;
  for (const CpuIsa isa : supported_isas()) {
    for (const Format& format : kFormats) {
      if (!has_own(isa, format.type)) continue;
      for (const WeightLayout layout : {WeightLayout::Panels, WeightLayout::Rows}) {
        if (format.type == QuantType::INT4 && layout == WeightLayout::Rows) continue;
        list.push_back({"expert_gemm", format.type, layout, name_of(isa),
                        mechanical_name(format, layout, isa)});
      }
    }
  }
  return list;
}

std::string CpuBackend::kernel_name(const WeightRef& weight, const Tuning& tuning) const {
  const Format* format = find_format(weight.type);
  if (format == nullptr) return "none";
  const CpuIsa isa = active_isa(tuning);
  return mechanical_name(*format, weight.layout,
                         has_own(isa, weight.type) ? isa : CpuIsa::Avx512Vnni);
}

}  // namespace moesaic::cpu
