#pragma once

/// Caller-owned scratch. One carve function lays out named pieces; run over a null base it only
/// counts.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "moesaic/types.hpp"

namespace moesaic {

class Backend;

inline constexpr std::size_t kWorkspaceAlignment = 64;

/// Hands out aligned pieces of a byte range. With `base == nullptr` it only counts.
class Carver {
 public:
  Carver(std::byte* base, std::size_t capacity) : base_(base), capacity_(capacity) {}
  static Carver counting() { return {nullptr, 0}; }

  /// `count` elements of T, 64-byte aligned; null when counting. Throws WorkspaceError naming
  /// `piece`, the bytes needed so far and the bytes available.
  template <class T>
  T* take(std::int64_t count, std::string_view piece) {
    return static_cast<T*>(take_bytes(static_cast<std::size_t>(count) * sizeof(T), piece));
  }
  std::size_t used() const { return used_; }

 private:
  void* take_bytes(std::size_t bytes, std::string_view piece);
  std::byte* base_;
  std::size_t capacity_;
  std::size_t used_ = 0;
};

/// Owned or borrowed bytes that one forward at a time works in. Using one workspace from two
/// threads at once throws WorkspaceError.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes);
  Workspace(std::size_t bytes, const Backend& backend);  ///< in the backend's memory
  /// Borrows memory on `device`, which must be 64-byte aligned and outlive the workspace.
  Workspace(void* memory, std::size_t bytes, Device device = {});
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  std::size_t size() const { return size_; }
  std::byte* data() const { return data_; }
  Device device() const { return device_; }
  /// Grows an owned workspace, keeping nothing. Throws WorkspaceError on a borrowed or busy one.
  void reserve(std::size_t bytes);

  /// Marks the workspace busy while alive.
  class Use {
   public:
    explicit Use(Workspace& workspace);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Workspace& workspace_;
  };

 private:
  struct Free {
    Free() noexcept : backend(nullptr), bytes(0) {}
    Free(const Backend* where, std::size_t size) noexcept : backend(where), bytes(size) {}
    const Backend* backend;  ///< null: the host
    std::size_t bytes;
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte, Free> owned_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  const Backend* backend_ = nullptr;
  Device device_{};
  std::atomic<bool> busy_{false};
};

}  // namespace moesaic
