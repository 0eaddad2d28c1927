#pragma once

/// The live state of one layer's fast memory: which expert lies in which slot, as kernels see it.
/// The pool says what should be there; reconcile() makes it so.

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
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

  /// While this is held, the map and the slots that it names do not change. A thread that
  /// reconciles must not hold it.
  std::shared_lock<std::shared_mutex> hold() {
    const std::lock_guard turnstile(turnstile_);
    return std::shared_lock(map_mutex_);
  }
  /// The residents as a stack for kernels; null when there are no slots. Needs hold().
  const ExpertStack* residents() const { return residents_.get(); }
  /// The slot of an expert, -1 when it is not resident. Needs hold().
  std::int32_t slot_of(std::int32_t expert) const { return map_[static_cast<std::size_t>(expert)]; }
  std::vector<std::int32_t> slot_map();

  /// Makes slots outside the budget, through which pass the experts that get none of their own. One
  /// forward at a time uses them, under passage_mutex().
  void make_passage(const Backend& backend);
  bool has_passage() const { return passage_ != nullptr; }
  ExpertSlots& passage() { return *passage_; }
  std::mutex& passage_mutex() { return passage_mutex_; }
  std::int32_t passage_slots() const;

 private:
  void forked() noexcept override;
  std::vector<SlotLoad> missing_loads();
  void load_batch(Context& context, ExpertSource& source, std::span<const SlotLoad> loads,
                  std::span<const SlotLoad> next);
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
  std::mutex load_mutex_;  ///< one reconcile at a time
  std::mutex passage_mutex_;
  /// Held while map_ changes, beside what forwards and loads hold: a forked child sees a change as a
  /// whole, and bytes of a slot from before or after it.
  LeafMutex change_mutex_;
  std::unique_ptr<ExpertSlots> passage_;
};

}  // namespace moesaic::offload
