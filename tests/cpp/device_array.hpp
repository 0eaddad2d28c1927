#pragma once

/// Arrays in a backend's own memory, for tests that run on every backend.

#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#include "moesaic/backend.hpp"

namespace moesaic::testing {

template <class T>
class DeviceArray {
 public:
  DeviceArray(const Backend& backend, const std::vector<T>& values)
      : backend_(&backend), size_(values.size()), data_(allocate()) {
    if (size_ > 0) backend.copy(data_, values.data(), bytes());
  }
  /// Every byte 0xFF: NaN, or -1.
  DeviceArray(const Backend& backend, std::int64_t size)
      : DeviceArray(backend, poison(static_cast<std::size_t>(size))) {}
  ~DeviceArray() {
    if (data_ != nullptr) backend_->deallocate(data_, bytes());
  }
  DeviceArray(DeviceArray&& other) noexcept
      : backend_(other.backend_),
        size_(std::exchange(other.size_, 0)),
        data_(std::exchange(other.data_, nullptr)) {}
  DeviceArray& operator=(DeviceArray&&) = delete;

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    if (size_ > 0) backend_->copy(values.data(), data_, bytes());
    return values;
  }

 private:
  static std::vector<T> poison(std::size_t size) {
    std::vector<T> values(size);
    if (size > 0) std::memset(values.data(), 0xFF, size * sizeof(T));
    return values;
  }
  std::size_t bytes() const { return size_ * sizeof(T); }
  T* allocate() const { return size_ > 0 ? static_cast<T*>(backend_->allocate(bytes())) : nullptr; }

  const Backend* backend_;
  std::size_t size_;
  T* data_;
};

}  // namespace moesaic::testing
