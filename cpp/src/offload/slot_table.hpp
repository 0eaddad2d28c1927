#pragma once

/// The live state of one layer's fast memory: which expert lies in which slot, as kernels see it.
/// The pool says what should be there; reconcile() makes it so.

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <vector>

#include "base/fork.hpp"
#include "offload/slots.hpp"
#include "offload/source.hpp"

namespace moesaic::offload {

/// The stack `source` with its roles in other memory, addressed through a slot map.
ExpertStack stack_over(const ExpertStack& source, const std::array<WeightRef, 3>& refs,
                       const std::int32_t* slot_map, std::shared_ptr<const void> owner);

class SlotTable final : private ForkHook {
 public:
  /// `layer` is its number in the store. Allocates slots for the pool's budget. Errors: as
  /// make_slots.
  SlotTable(const LayerMoeWeights& weights, std::int32_t layer, std::shared_ptr<ExpertPool> pool,
            const Backend& backend);
  ~SlotTable() override { unwatch(); }

  std::int32_t layer() const { return layer_; }
  ExpertPool& pool() const { return *pool_; }
  const std::shared_ptr<ExpertPool>& pool_ptr() const { return pool_; }
  std::int64_t expert_bytes() const { return weights_.expert_bytes; }
  std::int64_t nbytes() const;

  /// Loads what the pool wants and the slots do not hold; returns the bytes moved. Forwards run
  /// meanwhile: only between copies does the map change, while none of them reads it.
  std::int64_t reconcile(Context& context, ExpertSource& source);

  /// Experts on their way into slots, of one table one Loading at a time. Making one takes off the
  /// map whoever lies in their slots; publish() puts on it those that were copied. An expert whose
  /// copy failed stays off. Neither may be called while hold() is held.
  class Loading {
   public:
    /// What the pool wants in a slot where it is not: all of it, or only those among `only`.
    Loading(SlotTable& table, std::optional<std::span<const std::int32_t>> only);
    std::span<const SlotLoad> loads() const { return loads_; }
    /// Copies `expert`, if it is one of loads(), into its slot, and returns that; -1 for another.
    /// Until publish() only the caller may read the slot.
    std::int32_t load(Context& context, std::int32_t expert, const ExpertBytes& from);
    void publish();

   private:
    SlotTable& table_;
    std::unique_lock<std::mutex> one_;
    std::vector<SlotLoad> loads_;
    std::vector<SlotLoad> copied_;  ///< not published yet
  };

  /// While this is held, the map and the slots that it names do not change. A thread that
  /// reconciles must not hold it.
  std::shared_lock<std::shared_mutex> hold() {
    const std::lock_guard turnstile(turnstile_);
    return std::shared_lock(map_mutex_);
  }
  /// All slots; null when there are none.
  const ExpertSlots* slots() const { return slots_.get(); }
  /// The residents as a stack for kernels; null when there are no slots. Needs hold().
  const ExpertStack* residents() const { return residents_.get(); }
  /// The slot of an expert, -1 when it is not resident. Needs hold().
  std::int32_t slot_of(std::int32_t expert) const { return map_[static_cast<std::size_t>(expert)]; }
  std::vector<std::int32_t> slot_map();

 private:
  void forked() noexcept override;
  std::vector<SlotLoad> missing_loads(std::optional<std::span<const std::int32_t>> only);
  void set_slots(std::span<const SlotLoad> loads, bool resident);

  const LayerMoeWeights& weights_;
  std::int32_t layer_;
  std::shared_ptr<ExpertPool> pool_;
  std::unique_ptr<ExpertSlots> slots_;
  std::vector<std::int32_t> map_;     ///< [E], what residents_ reads
  std::vector<std::int32_t> wanted_;  ///< [E], what the pool said last; guarded by load_mutex_
  std::unique_ptr<ExpertStack> residents_;
  std::shared_mutex map_mutex_;  ///< held shared by forwards, exclusively by changes of map_
  std::mutex turnstile_;   ///< stops new forwards while a change of map_ waits for the running ones
  std::mutex load_mutex_;  ///< one Loading at a time
  /// Held while map_ changes, beside what forwards and loads hold: a forked child sees a change as a
  /// whole, and bytes of a slot from before or after it.
  LeafMutex change_mutex_;
};

}  // namespace moesaic::offload
