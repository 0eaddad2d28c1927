#pragma once

/// Large allocations: 64-byte aligned, in 2 MiB pages where the system gives them, on the NUMA nodes
/// that the process uses (Tuning::process().numa).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace moesaic {

/// Zeroed memory; throws OutOfMemoryError. With several nodes a large allocation is spread over
/// them page by page, as nobody knows which will read it; else pages lie near their first writer.
std::shared_ptr<std::byte> allocate_pages(std::size_t bytes);
/// What allocate_pages(bytes) takes: whole huge pages where it takes those.
std::size_t allocated_bytes(std::size_t bytes);

/// Says that mapped bytes will be read soon, so that the system fetches those that are not in memory
/// with large requests; page faults would fetch them little by little, one after the other. Where
/// the system tells nobody but the owner of the file what is in memory, nothing is fetched.
void will_read(std::span<const std::byte> bytes) noexcept;

struct NodePages {
  std::shared_ptr<std::byte> memory;
  int error;  ///< 0, or the errno value with which the system refused to bind the pages
};
/// Zeroed memory that node `id` reads fastest: its pages come from there while it has any. Less than
/// a huge page, or with an id of -1, it is memory like any other.
NodePages allocate_on_node(std::size_t bytes, std::int32_t id);

}  // namespace moesaic
