#pragma once

/// Large allocations: 64-byte aligned, in 2 MiB pages where the system gives them.

#include <cstddef>
#include <memory>

namespace moesaic {

/// Zeroed memory; throws OutOfMemoryError. Pages are touched by the first writer (NUMA-local).
std::shared_ptr<std::byte> allocate_pages(std::size_t bytes);

}  // namespace moesaic
