// Slots on the CPU: one arena per role, into which experts are repacked as panels when they come. Its
// pages are spread over NUMA nodes, since a slot's expert changes faster than it could be dealt.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/pages.hpp"
#include "cpu/pack.hpp"
#include "moesaic/error.hpp"
#include "moesaic/thread_pool.hpp"
#include "offload/slots.hpp"

namespace moesaic::offload {
namespace {

/// How a role lies in a slot: in panels where its type has them, else as it comes.
WeightRef slot_layout(const WeightRef& source) {
  WeightRef slot;
  if (source.layout == WeightLayout::Rows && cpu::panel_layout(source, slot)) return slot;
  slot = source;
  slot.base = nullptr;
  slot.table = nullptr;
  // Experts of a fused tensor lie further apart than they are long.
  if (source.layout == WeightLayout::Rows) slot.expert_stride = source.rows * source.row_stride;
  return slot;
}

/// What the slots of a role take.
std::int64_t arena_bytes(const WeightRef& slot, std::int32_t num_slots) {
  const auto bytes = static_cast<std::size_t>(num_slots * slot.expert_stride);
  return static_cast<std::int64_t>(allocated_bytes(bytes));
}

class CpuSlots final : public ExpertSlots {
 public:
  CpuSlots(const ExpertStack& source, std::int32_t num_slots) : num_slots_(num_slots) {
    for (const Role role : kRoles) {
      const WeightRef& from = source.role(role).ref;
      if (!from) continue;
      Part& part = parts_[static_cast<std::size_t>(role)];
      part.from = from;
      part.to = slot_layout(from);
      part.absent = cpu::absent_row(from);
      part.arena = allocate_pages(static_cast<std::size_t>(num_slots * part.to.expert_stride));
      part.to.base = part.arena.get();
      nbytes_ += arena_bytes(part.to, num_slots);
    }
  }

  std::int32_t num_slots() const override { return num_slots_; }
  std::int64_t nbytes() const override { return nbytes_; }
  const WeightRef& ref(Role role) const override {
    return parts_[static_cast<std::size_t>(role)].to;
  }
  std::shared_ptr<const void> owner() const override {
    return std::make_shared<std::array<Part, 3>>(parts_);
  }

  void load(Context& context, std::int32_t slot, const ExpertBytes& from) override {
    for (std::size_t r = 0; r < parts_.size(); ++r) {
      const Part& part = parts_[r];
      if (part.arena == nullptr) continue;
      std::byte* const to = part.arena.get() + slot * part.to.expert_stride;
      if (part.to.layout == part.from.layout) {
        std::memcpy(to, from[r], static_cast<std::size_t>(part.to.expert_stride));
        continue;
      }
      const std::int64_t panels = (part.from.rows + cpu::kPanelRows - 1) / cpu::kPanelRows;
      const std::int64_t chunks = (panels + kPanelsPerChunk - 1) / kPanelsPerChunk;
      context.pool().parallel_for(chunks, [&](std::int64_t chunk, int) {
        const std::int64_t first = chunk * kPanelsPerChunk;
        cpu::pack_panels(part.from, from[r], first, std::min(panels, first + kPanelsPerChunk),
                         part.absent, to + first * part.to.row_stride);
      });
    }
  }
  void wait(Context&) override {}  // load() returns with the copy complete

 private:
  static constexpr std::int64_t kPanelsPerChunk = 8;
  struct Part {
    WeightRef from, to;
    std::vector<std::byte> absent;
    std::shared_ptr<std::byte> arena;
  };
  std::array<Part, 3> parts_{};
  std::int32_t num_slots_;
  std::int64_t nbytes_ = 0;
};

void check_host(const Backend& backend) {
  require<UnsupportedError>(backend.device_type() == DeviceType::Cpu, [&] {
    return Problem{.operation = "expert slots",
                   .what = "backend",
                   .expected = "one with slots for experts",
                   .got = backend.info().name,
                   .hint = backend.device_type() == DeviceType::Metal
                               ? "its memory is the host's, so that slots would gain nothing: load "
                                 "whole layers there, or run the store on the CPU"
                               : "load the whole layer there instead"};
  });
}

}  // namespace

std::int64_t slot_bytes(const Backend& backend, const ExpertStack& source, std::int32_t num_slots) {
  check_host(backend);
  std::int64_t bytes = 0;
  for (const Role role : kRoles) {
    if (const WeightRef& ref = source.role(role).ref) {
      bytes += arena_bytes(slot_layout(ref), num_slots);
    }
  }
  return bytes;
}

std::unique_ptr<ExpertSlots> make_slots(const Backend& backend, const ExpertStack& source,
                                        std::int32_t num_slots) {
  check_host(backend);
  return std::make_unique<CpuSlots>(source, num_slots);
}

}  // namespace moesaic::offload
