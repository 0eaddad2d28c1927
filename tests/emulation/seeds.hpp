// The schedules that a test of an emulated kernel runs under.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "runtime/emulator.hpp"
#include "runtime/sanitizers.hpp"

namespace moesaic::emulation {

// Seed 0 runs in order, the others in random orders. ThreadSanitizer finds a race from the order of
// events, whatever the schedule, and needs one run. MOESAIC_EMULATION_SEEDS=n asks for n of them.
inline std::vector<uint64_t> seeds() {
  uint64_t count = race_checked() ? 1 : 3;
  if (const char* wish = std::getenv("MOESAIC_EMULATION_SEEDS")) {
    count = std::strtoull(wish, nullptr, 10);
  }
  std::vector<uint64_t> all(count);
  for (uint64_t seed = 0; seed < count; seed++) all[seed] = seed;
  return all;
}

}  // namespace moesaic::emulation
