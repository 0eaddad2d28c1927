// Launching a kernel: it has run when the call returns. What the kernel does wrong is thrown as
// emulation::Fault.
#pragma once

#include <cstddef>
#include <set>
#include <tuple>

#include "cuda/qualifiers.hpp"

namespace moesaic::emulation {

// Kernels that dev::load has loaded.
inline std::set<const void*>& loaded_kernels() {
  static std::set<const void*> kernels;
  return kernels;
}

// While one is alive, a launch loads no kernel, as in a graph: one that is not loaded is a fault.
class LoadedOnly {
 public:
  LoadedOnly() { ++alive; }
  ~LoadedOnly() { --alive; }
  LoadedOnly(const LoadedOnly&) = delete;
  LoadedOnly& operator=(const LoadedOnly&) = delete;
  static inline int alive = 0;
};

inline void check_loaded(const void* kernel) {
  if (LoadedOnly::alive > 0 && !loaded_kernels().contains(kernel))
    throw Fault("a graph launches a kernel that was not loaded before");
}

}  // namespace moesaic::emulation

namespace moesaic::dev {

using Stream = void*;

template <class... Kernels>
int load(Kernels... kernels) {
  (emulation::loaded_kernels().insert(reinterpret_cast<const void*>(kernels)), ...);
  return 0;
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_shared, Stream,
           Args... args) {
  emulation::check_loaded(reinterpret_cast<const void*>(kernel));
  const std::tuple<Params...> parameters(static_cast<Params>(args)...);
  emulation::launch(grid, block, dynamic_shared, [&] { std::apply(kernel, parameters); });
  return 0;
}

// Grids run one after another here, so a missing griddepcontrol_wait() does not show.
template <class... Params, class... Args>
int launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_shared,
                     Stream stream, Args... args) {
  return launch(kernel, grid, block, dynamic_shared, stream, args...);
}

}  // namespace moesaic::dev
