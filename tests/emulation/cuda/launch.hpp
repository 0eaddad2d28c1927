// Launching a kernel: it has run when the call returns. What the kernel does wrong is thrown as
// emulation::Fault.
#pragma once

#include <cstddef>
#include <set>
#include <tuple>

#include "cuda/qualifiers.hpp"
#include "runtime/sanitizers.hpp"

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

namespace detail {

// Each thread's own copy of what the host passes, which no memory of the device orders.
template <class... Params>
struct Call {
  void (*kernel)(Params...);
  std::tuple<Params...> parameters;

  static Call copied(const void* from) {
    const emulation::Unseen unseen;
    return *static_cast<const Call*>(from);
  }
  static void run(void* self) {
    const Call mine = copied(self);
    std::apply(mine.kernel, mine.parameters);
  }
};

template <class... Params>
int launch_as(emulation::Order order, void (*kernel)(Params...), dim3 grid, dim3 block,
              std::size_t dynamic_shared, Params... parameters) {
  emulation::check_loaded(reinterpret_cast<const void*>(kernel));
  Call<Params...> call{kernel, {parameters...}};
  emulation::launch(grid, block, dynamic_shared, &Call<Params...>::run, &call, order);
  return 0;
}

}  // namespace detail

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_shared, Stream,
           Args... args) {
  return detail::launch_as<Params...>(emulation::Order::after, kernel, grid, block, dynamic_shared,
                                      static_cast<Params>(args)...);
}

template <class... Params, class... Args>
int launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_shared,
                     Stream, Args... args) {
  return detail::launch_as<Params...>(emulation::Order::dependent, kernel, grid, block,
                                      dynamic_shared, static_cast<Params>(args)...);
}

}  // namespace moesaic::dev
