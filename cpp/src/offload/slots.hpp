#pragma once

/// Slots for experts in the memory that kernels read fastest. The CPU implements this interface
/// with panels in huge pages; a device would with its own memory, a copy stream and pinned staging.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"

namespace moesaic::offload {

inline constexpr Role kRoles[] = {Role::Gate, Role::Up, Role::Down};

/// Where the roles of one expert start in slow memory; null for a role that the layer lacks.
using ExpertBytes = std::array<const std::byte*, 3>;

/// A number of slots for experts of one layer.
class ExpertSlots {
 public:
  virtual ~ExpertSlots() = default;
  virtual std::int32_t num_slots() const = 0;
  virtual std::int64_t nbytes() const = 0;  ///< bytes of all slots
  /// A role over the slots, as a weight whose "expert" s is slot s. Empty for a role that the layer
  /// lacks.
  virtual const WeightRef& ref(Role role) const = 0;
  /// Keeps the memory that ref() points into alive.
  virtual std::shared_ptr<const void> owner() const = 0;
  /// Starts copying an expert into a slot that no forward reads. `from` stays readable until
  /// wait().
  virtual void load(Context& context, std::int32_t slot, const ExpertBytes& from) = 0;
  /// Returns when every copy that was started is complete and visible to kernels.
  virtual void wait(Context& context) = 0;
};

/// Bytes that `num_slots` slots for experts of `source` would take on this backend, as memory gives
/// them out.
std::int64_t slot_bytes(const Backend& backend, const ExpertStack& source, std::int32_t num_slots);
/// Makes the slots. Errors: UnsupportedError for a backend without slots, OutOfMemoryError.
std::unique_ptr<ExpertSlots> make_slots(const Backend& backend, const ExpertStack& source,
                                        std::int32_t num_slots);

}  // namespace moesaic::offload
