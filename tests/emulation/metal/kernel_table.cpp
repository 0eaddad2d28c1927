// Every kernel of metal/kernels.inc, compiled as C++, under its name: what the fake runtime runs.

#include <array>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "all_kernels.h"
#include "fake_runtime/fake_metal.hpp"
#include "launch.hpp"

namespace {

using fake_metal::Kernel;

/// Parameters of a kernel between its arguments and THREAD_POSITION.
constexpr std::size_t kPositions = 3;

template <class Arguments, class... Rest, std::size_t... I>
void run_kernel(void (*function)(const Arguments&, Rest...), std::index_sequence<I...>,
                const void* arguments, void* const* buffers, const std::uint32_t* groups,
                std::uint32_t threads) {
  using Parameters = std::tuple<Rest...>;
  Arguments values;
  std::memcpy(&values, arguments, sizeof values);
  moesaic::emulation::metal_launch(
      {groups[0], groups[1], groups[2]}, threads, [&](uint3 position, uint simdgroup, uint lane) {
        function(values, static_cast<std::tuple_element_t<I, Parameters>>(buffers[I])..., position,
                 simdgroup, lane);
      });
}

template <class Arguments, class... Rest>
Kernel make_entry(void (*function)(const Arguments&, Rest...)) {
  using Function = void (*)(const Arguments&, Rest...);
  constexpr std::size_t kBuffers = sizeof...(Rest) - kPositions;
  std::vector<std::size_t> alignments;
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (alignments.push_back(
         alignof(std::remove_pointer_t<std::tuple_element_t<I, std::tuple<Rest...>>>)),
     ...);
  }(std::make_index_sequence<kBuffers>());
  return {.alignments = std::move(alignments),
          .run =
              [](const Kernel& entry, const void* arguments, void* const* buffers,
                 const std::uint32_t* groups, std::uint32_t threads) {
                run_kernel(reinterpret_cast<Function>(entry.function),
                           std::make_index_sequence<kBuffers>(), arguments, buffers, groups,
                           threads);
              },
          .function = reinterpret_cast<void (*)()>(function),
          .argument_bytes = sizeof(Arguments)};
}

const std::map<std::string, Kernel, std::less<>>& table() {
  static const std::map<std::string, Kernel, std::less<>> kernels = {
#define MOESAIC_METAL_KERNEL(name) {#name, make_entry(&name)},
#include "metal/kernels.inc"
  };
  return kernels;
}

}  // namespace

namespace fake_metal {

const Kernel* find_kernel(std::string_view name) {
  const auto found = table().find(name);
  return found != table().end() ? &found->second : nullptr;
}

void set_function_constant(unsigned index, int value) { metal::emulated_constants[index] = value; }

}  // namespace fake_metal
