#pragma once

/// Scratch of one forward on a pool, kept for the next. Its stacks read its maps, so it never
/// moves.

#include <memory>
#include <vector>

#include "offload/slot_table.hpp"

namespace moesaic::offload {

struct ForwardState {
  std::vector<std::int32_t> needed;  ///< distinct experts, in order of appearance
  std::vector<std::int64_t> pairs;   ///< [E]
  std::vector<std::int32_t> cold;    ///< needed without a slot
  PoolStats stats;                   ///< of this forward

  std::vector<std::int32_t> wave_map;  ///< [E]: -1, or the expert's slot in the wave's memory
  std::array<std::vector<const std::byte*>, 3> pointers;  ///< [E]: where a cold expert lies
  ExpertStack slow;                                       ///< cold experts through `pointers`
  std::unique_ptr<ExpertStack> passage;                   ///< cold experts in passage slots

  ForwardState(const ExpertStack& source, SlotTable& table, bool stage);
  ForwardState(const ForwardState&) = delete;
  ForwardState& operator=(const ForwardState&) = delete;

  void collect(const RoutingView& routing);
  /// Who is resident before anything is staged. Under table.hold().
  void count_hits(const SlotTable& table);
  /// Under table.hold().
  void find_cold(const SlotTable& table);
  /// Makes a wave of cold experts readable: copied into `slots`, or where the batch has them.
  void bring(std::span<const std::int32_t> wave, ExpertBatch& batch, ExpertSlots* slots,
             Context& context);
  void clear(std::span<const std::int32_t> wave);

 private:
  ExpertStack over_pointers(const ExpertStack& source) const;
};

}  // namespace moesaic::offload
