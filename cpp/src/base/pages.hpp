#pragma once

/// Large allocations: 64-byte aligned, in 2 MiB pages where the system gives them.

#include <cstddef>
#include <memory>
#include <span>

namespace moesaic {

/// Zeroed memory; throws OutOfMemoryError. Pages are touched by the first writer (NUMA-local).
std::shared_ptr<std::byte> allocate_pages(std::size_t bytes);
/// What allocate_pages(bytes) takes: whole huge pages where it takes those.
std::size_t allocated_bytes(std::size_t bytes);

/// Says that mapped bytes will be read soon, so that the system fetches those that are not in memory
/// with large requests; page faults would fetch them little by little, one after the other. Where
/// the system tells nobody but the owner of the file what is in memory, nothing is fetched.
void will_read(std::span<const std::byte> bytes) noexcept;

}  // namespace moesaic
