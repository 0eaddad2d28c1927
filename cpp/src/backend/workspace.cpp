#include "moesaic/workspace.hpp"

#include <cstdint>
#include <limits>
#include <new>
#include <string>

#include "moesaic/backend.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

constexpr std::align_val_t kAlignment{kWorkspaceAlignment};

/// What an owned workspace of no bytes points at: a null base would mean "only count" to a Carver.
alignas(kWorkspaceAlignment) std::byte nothing[kWorkspaceAlignment];

std::byte* allocate(std::size_t bytes) {
  void* memory = ::operator new(bytes, kAlignment, std::nothrow);
  require<OutOfMemoryError>(memory != nullptr, [&] {
    return Problem{"Workspace", "allocation", std::to_string(bytes) + " bytes", "no memory", ""};
  });
  return static_cast<std::byte*>(memory);
}

}  // namespace

void* Carver::take_bytes(std::size_t bytes, std::string_view piece) {
  constexpr std::size_t kMax = std::numeric_limits<std::size_t>::max() - kWorkspaceAlignment;
  require<WorkspaceError>(used_ <= kMax && bytes <= kMax - used_, [&] {
    return Problem{"Workspace", std::string(piece), "a size in range",
                   std::to_string(bytes) + " bytes", ""};
  });
  const std::size_t begin =
      (used_ + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  const std::size_t end = begin + bytes;
  if (base_ != nullptr) {
    require<WorkspaceError>(end <= capacity_, [&] {
      return Problem{"Workspace", std::string(piece), "at least " + std::to_string(end) + " bytes",
                     std::to_string(capacity_), "workspace_bytes() gives the size"};
    });
  }
  used_ = end;
  return base_ != nullptr ? base_ + begin : nullptr;
}

void Workspace::Free::operator()(std::byte* p) const {
  if (backend != nullptr) {
    backend->deallocate(p, bytes);
  } else {
    ::operator delete(p, kAlignment);
  }
}

Workspace::Workspace(std::size_t bytes) : data_(nothing) {
  if (bytes > 0) reserve(bytes);
}

Workspace::Workspace(std::size_t bytes, const Backend& backend)
    : data_(nothing), backend_(&backend), device_(backend.device()) {
  if (bytes > 0) reserve(bytes);
}

Workspace::Workspace(void* memory, std::size_t bytes, Device device)
    : data_(static_cast<std::byte*>(memory)), size_(bytes), device_(device) {
  require<WorkspaceError>(
      memory != nullptr && reinterpret_cast<std::uintptr_t>(memory) % kWorkspaceAlignment == 0,
      [&] {
        return Problem{"Workspace", "memory",
                       "an address that is a multiple of " + std::to_string(kWorkspaceAlignment),
                       std::to_string(reinterpret_cast<std::uintptr_t>(memory)), ""};
      });
}

Workspace::~Workspace() = default;

void Workspace::reserve(std::size_t bytes) {
  const Use use(*this);
  if (bytes <= size_) return;
  require<WorkspaceError>(owned_ != nullptr || data_ == nothing, [&] {
    return Problem{"Workspace", "borrowed memory", std::to_string(bytes) + " bytes",
                   std::to_string(size_), "borrowed workspaces do not grow"};
  });
  // Released first, so that the two never exist at once; a failed allocation leaves it empty.
  owned_.reset();
  data_ = nothing;
  size_ = 0;
  std::byte* const memory =
      backend_ != nullptr ? static_cast<std::byte*>(backend_->allocate(bytes)) : allocate(bytes);
  owned_ = std::unique_ptr<std::byte, Free>(memory, Free(backend_, bytes));
  data_ = owned_.get();
  size_ = bytes;
}

Workspace::Use::Use(Workspace& workspace) : workspace_(workspace) {
  const bool busy = workspace_.busy_.exchange(true, std::memory_order_acquire);
  require<WorkspaceError>(!busy, [] {
    return Problem{"Workspace", "workspace", "a free workspace", "one in use by another call",
                   "give each thread its own"};
  });
}

Workspace::Use::~Use() { workspace_.busy_.store(false, std::memory_order_release); }

}  // namespace moesaic
