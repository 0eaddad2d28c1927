// Launching a kernel: it has run when the call returns. What the kernel does wrong is thrown as
// emulation::Fault.
#pragma once

#include <cstddef>
#include <tuple>

#include "cuda/qualifiers.hpp"

namespace moesaic::dev {

using Stream = void*;

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_shared, Stream,
           Args... args) {
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
