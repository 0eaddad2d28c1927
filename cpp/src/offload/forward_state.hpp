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

  std::vector<std::int32_t> wave_map;  ///< [E]: -1, or the expert's slot in the wave's memory
  std::array<std::vector<const std::byte*>, 3> pointers;  ///< [E]: where a cold expert lies
  ExpertStack slow;                                       ///< cold experts through `pointers`
  std::unique_ptr<ExpertStack> passage;                   ///< cold experts in passage slots

  std::unique_ptr<ForwardState> next;  ///< of those that no forward uses

  ForwardState(const ExpertStack& source, SlotTable& table, bool stage);
  ForwardState(const ForwardState&) = delete;
  ForwardState& operator=(const ForwardState&) = delete;

  /// Finds the experts that a routing needs; resets everything else.
  void collect(const RoutingView& routing);
  /// Counts which needed experts are resident, before anything is staged. Needs table.hold().
  void count_hits(const SlotTable& table);
  /// Finds the needed experts without a slot. Needs table.hold().
  void find_cold(const SlotTable& table);
  /// Makes a wave of cold experts readable: copies them into `slots`, or, without slots, points at
  /// them where the batch has them.
  void bring(std::span<const std::int32_t> wave, ExpertBatch& batch, ExpertSlots* slots,
             Context& context);
  /// Takes a wave off wave_map again.
  void clear(std::span<const std::int32_t> wave);

 private:
  ExpertStack over_pointers(const ExpertStack& source) const;
};

}  // namespace moesaic::offload
