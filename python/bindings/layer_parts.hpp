#pragma once

/// What a MoeLayer is made of, from and to Python: its constructor, its accessors, replace().

#include <cstdint>
#include <optional>

#include "layer.hpp"

namespace moesaic::python {

using LayerClass = py::class_<LayerObject>;

/// Shared experts from a SharedExperts, or from a stack and its gate [H]; empty for None. Errors:
/// ConfigError for a gate without experts or beside one of theirs, ShapeError.
std::optional<SharedExperts> import_shared(const py::object& shared, const py::object& gate,
                                           std::int64_t hidden, const char* operation);

/// The arguments of the constructor beside stack, config and precision, each None where there is none.
struct LayerArguments {
  py::object router_weight = py::none(), shared = py::none(), shared_gate = py::none(),
             latent = py::none(), latent_norm = py::none(), input_norm = py::none(),
             router_norm = py::none(), token_experts = py::none();
};
/// What a layer is made of. Errors: those of the constructor, naming the argument.
MoeLayer::Parts import_parts(std::shared_ptr<const ExpertStack> stack, const MoeConfig& config,
                             const LayerArguments& arguments);

/// Adds what makes layers of others.
void define_layer_edits(LayerClass& type);

/// Adds a forward in three calls, and the counts of experts.
void define_layer_calls(LayerClass& type);

/// Adds the constructor and what gives its arguments back.
void define_layer_parts(LayerClass& type);

}  // namespace moesaic::python
