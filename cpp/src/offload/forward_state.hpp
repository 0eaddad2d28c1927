#pragma once

/// What one forward on a pool works with, kept for the next one so that a forward allocates
/// nothing. Its stacks point into its maps, so it must not move in memory.

#include <memory>
#include <vector>

#include "offload/slot_table.hpp"

namespace moesaic::offload {

struct ForwardState {
  std::vector<std::int32_t> needed;  ///< distinct experts, in order of appearance
  std::vector<std::int64_t> pairs;   ///< [E], pairs of each expert
  std::vector<std::int32_t> cold;    ///< needed experts without a slot
  PoolStats stats;                   ///< what this forward will count

  std::vector<std::int32_t> shown;  ///< [E]: the expert while `pointers` has it, else -1
  std::array<std::vector<const std::byte*>, 3> pointers;  ///< [E]: where a cold expert lies
  ExpertStack slow;                                       ///< cold experts through `pointers`
  std::vector<std::int32_t> placed;    ///< [E]: the slot of one that came in this forward, else -1
  std::unique_ptr<ExpertStack> fresh;  ///< cold experts through `placed`; null without slots

  std::unique_ptr<ForwardState> next;  ///< of those that no forward uses

  ForwardState(const ExpertStack& source, const SlotTable& table);
  ForwardState(const ForwardState&) = delete;
  ForwardState& operator=(const ForwardState&) = delete;

  /// Finds the experts that a routing needs; resets everything else.
  void collect(const RoutingView& routing);
  /// Counts which needed experts are resident, before anything is staged. Needs table.hold().
  void count_hits(const SlotTable& table);
  /// Finds the needed experts without a slot. Needs table.hold().
  void find_cold(const SlotTable& table);
  /// Shows kernels where a cold expert lies: its bytes, or the slot that it came to.
  void show(std::int32_t expert, const ExpertBytes& bytes);
  void show(std::int32_t expert, std::int32_t slot) {
    placed[static_cast<std::size_t>(expert)] = slot;
  }
  void hide(std::int32_t expert) {
    shown[static_cast<std::size_t>(expert)] = placed[static_cast<std::size_t>(expert)] = -1;
  }

 private:
  ExpertStack over_pointers(const ExpertStack& source) const;
};

}  // namespace moesaic::offload
