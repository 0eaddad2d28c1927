#pragma once

/// Compiled kernels by name and function constants. The source is part of this library and compiled
/// by the driver at first use.

#include <map>
#include <utility>

#include "metal/dispatch_shape.hpp"
#include "metal/host/metal_cpp.hpp"
#include "moesaic/leaf_mutex.hpp"

namespace moesaic::metal {

class Pipelines {
 public:
  explicit Pipelines(MTL::Device* device) : device_(device) {}

  /// Lives as long as this object. Threads that ask for the same kernel at first may each compile
  /// it, which takes long and so holds no lock; the first one is kept. Throws DeviceError with the
  /// compiler's words.
  MTL::ComputePipelineState* get(Kernel kernel, const Constants& constants);

 private:
  NS::SharedPtr<MTL::Library> library();
  NS::SharedPtr<MTL::ComputePipelineState> compile(Kernel kernel, const Constants& constants);

  MTL::Device* device_;
  LeafMutex mutex_;
  NS::SharedPtr<MTL::Library> library_;
  std::map<std::pair<Kernel, Constants>, NS::SharedPtr<MTL::ComputePipelineState>> pipelines_;
};

}  // namespace moesaic::metal
