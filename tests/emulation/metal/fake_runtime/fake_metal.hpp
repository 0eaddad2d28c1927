#pragma once

/// A Metal device for tests: what it can be made to do wrong, what it has counted, and the kernels
/// that it runs. As on a real device, committed commands run on a thread of the queue's own, some
/// time later, so host code that reads too early reads poison. Every buffer ends at a page that
/// cannot be touched.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fake_metal {

/// A kernel as the launcher table knows it.
struct Kernel {
  std::vector<std::size_t> alignments;  ///< of what each buffer holds, from index 1 on
  void (*run)(const Kernel& kernel, const void* arguments, void* const* buffers,
              const std::uint32_t* groups, std::uint32_t threads);
  void (*function)();
  std::size_t argument_bytes;
};
/// Null for a name that no kernel has.
const Kernel* find_kernel(std::string_view name);
/// Value of a function constant for the launch that follows.
void set_function_constant(unsigned index, int value);

/// What goes wrong next; nothing by default.
struct Faults {
  bool no_device = false;
  bool no_default_device = false;  ///< as without a window server; there are devices all the same
  bool old_system = false;         ///< macOS 14, without what came with 15
  bool old_device = false;         ///< supports no Apple family
  bool no_memory = false;          ///< every new buffer fails
  unsigned long max_buffer = 1UL << 32;  ///< bytes of the largest buffer
  bool no_mapping = false;               ///< buffers over existing pages fail
  bool does_not_compile = false;
  long command_error = 0;  ///< code with which command buffers committed now will end
};
Faults& faults();

/// When commands run; read at their commit.
struct Pace {
  /// How long they lie in the queue when nobody waits.
  std::chrono::microseconds idle{2000};
  /// How long a command buffer takes at least.
  std::chrono::microseconds takes{0};
  /// How long a new command buffer waits for one of the others before the program counts as stuck.
  std::chrono::microseconds patience{20'000'000};
};
Pace& pace();

/// Command buffers of a queue that may exist and be unfinished; the next one waits.
inline constexpr long kMaxOpenBuffers = 64;

/// Counted by several threads; read and set while none of them runs.
struct Counters {
  long command_buffers = 0;  ///< committed
  long dispatches = 0;       ///< run
  long indirect = 0;         ///< of these, with a grid from a buffer
  long libraries = 0;
  long pipelines = 0;
  long mapped_bytes = 0;  ///< in buffers over existing pages
  long residency_requests = 0;
  long residency_ends = 0;
};
Counters& counters();

/// Objects that exist now.
long live_objects();

}  // namespace fake_metal
