#pragma once

#include <memory>
#include <optional>

#include "bindings.hpp"
#include "moesaic/expert_pool.hpp"
#include "moesaic/layer.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic::python {

/// A layer that can be closed: calls under way keep their own hold on it.
class LayerObject {
 public:
  LayerObject(std::shared_ptr<const MoeLayer> layer, std::optional<Precision> precision)
      : layer_(std::move(layer)), precision_(precision) {}
  /// Throws DeviceError after close().
  std::shared_ptr<const MoeLayer> get(const char* operation) const;
  std::optional<Precision> precision() const { return precision_; }
  bool closed() const { return layer_ == nullptr; }
  void close() { layer_.reset(); }
  /// Counts calls from here on; null until count_usage().
  const std::shared_ptr<UsageCounter>& usage() const { return usage_; }
  void count_usage(std::shared_ptr<UsageCounter> usage) { usage_ = std::move(usage); }

 private:
  std::shared_ptr<const MoeLayer> layer_;  // both changed with the GIL only
  std::shared_ptr<UsageCounter> usage_;
  std::optional<Precision> precision_;
};

/// `config` with another number of experts per token.
MoeConfig with_top_k(MoeConfig config, std::int32_t top_k, const char* operation);

/// Notes how pickle makes a layer that came from files again, and with it its stack.
void remember_layer(const std::shared_ptr<const MoeLayer>& layer, const py::object& reduced_layer);

}  // namespace moesaic::python
