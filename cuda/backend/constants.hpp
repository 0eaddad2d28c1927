#pragma once

/// Small host arrays that a call brings (router weights, biases, norms, token tables), on the
/// device from their first use on: uploaded once by content, kept while the backend lives.

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda/backend/device.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/leaf_mutex.hpp"

namespace moesaic::cuda {

class Constants {
 public:
  explicit Constants(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}
  ~Constants();
  Constants(const Constants&) = delete;
  Constants& operator=(const Constants&) = delete;

  /// Null for an empty array. While `stream` records a graph, an array that is new here is a
  /// CaptureError of `operation`.
  const void* find(HostValues values, std::string_view operation, Stream stream) const;
  /// From now on `find` knows these values by their address, while the result lives.
  std::shared_ptr<const void> pin(HostValues values) const;

 private:
  struct Entry {
    std::vector<std::byte> values;
    void* memory;
  };
  /// Device copies of pinned values, by host address. Handles of pin() share ownership, so they may
  /// outlive the backend.
  struct Pins {
    LeafMutex mutex;
    std::map<std::pair<const std::byte*, std::size_t>, std::shared_ptr<void>> memory;
  };
  std::shared_ptr<const Gpu> gpu_;
  std::shared_ptr<Pins> pins_ = std::make_shared<Pins>();
  mutable LeafMutex mutex_;
  mutable std::unordered_multimap<std::uint64_t, Entry> entries_;
};

}  // namespace moesaic::cuda
