#include "cpu/cpu_backend.hpp"

#include <cstring>
#include <new>

#include "cpu/isa.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

/// "avx512vnni", or what MOESAIC_CPU_ISA asks for.
std::string isa_detail() {
  const CpuIsa forced = Tuning::process().cpu_isa;
  if (forced == CpuIsa::Auto) {
    const std::string best = name_of(best_isa());
    return amx_refusal().empty() ? best : best + " (amx refused: " + amx_refusal() + ")";
  }
  return std::string(name_of(forced)) + (supported(forced) ? " (forced by MOESAIC_CPU_ISA)"
                                                           : " (MOESAIC_CPU_ISA, cannot run here)");
}

}  // namespace

BackendInfo CpuBackend::info() const {
  return {.name = "cpu",
          .available = true,
          .reason = "",
          .devices = {Device{DeviceType::Cpu, 0}},
          .detail = isa_detail()};
}

void* CpuBackend::allocate(std::size_t bytes) const {
  void* const memory = ::operator new(bytes, kAlignment, std::nothrow);
  require<OutOfMemoryError>(memory != nullptr, [&] {
    return Problem{"cpu backend", "allocate", std::to_string(bytes) + " bytes", "no memory", ""};
  });
  return memory;
}

void CpuBackend::deallocate(void* memory, std::size_t) const noexcept {
  ::operator delete(memory, kAlignment);
}

void CpuBackend::copy(void* to, const void* from, std::size_t bytes) const {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void CpuBackend::fill(Context&, const op::Fill& call) const {
  if (call.bytes > 0) std::memset(call.data, call.value, static_cast<std::size_t>(call.bytes));
}

}  // namespace moesaic::cpu
