#include "forward/check.hpp"

#include <algorithm>
#include <limits>
#include <string>

namespace moesaic::forward {
namespace {

/// Room for the padding of an aligned routing inside int32.
constexpr std::int64_t kMaxPairs = std::numeric_limits<std::int32_t>::max() / 2;

std::string shape_text(std::initializer_list<std::int64_t> dims) {
  std::string text = "[";
  for (const std::int64_t d : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

bool has_shape(const ConstTensorView& view, std::initializer_list<std::int64_t> dims) {
  if (view.rank != static_cast<int>(dims.size())) return false;
  int i = 0;
  for (const std::int64_t d : dims) {
    if (view.dim(i++) != d) return false;
  }
  return true;
}

void check_shape(const char* operation, const char* name, const ConstTensorView& view,
                 std::initializer_list<std::int64_t> dims) {
  require<ShapeError>(has_shape(view, dims), [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".shape",
                   .expected = shape_text(dims),
                   .got = describe(view),
                   .hint = {}};
  });
  require<ShapeError>(view.data != nullptr || view.empty(), [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".data",
                   .expected = "memory for " + describe(view),
                   .got = "null",
                   .hint = {}};
  });
}

void check_contiguous_rows(const char* operation, const char* name, const ConstTensorView& view) {
  const int last = view.rank - 1;
  require<ShapeError>(view.empty() || view.dim(last) == 1 || view.stride(last) == 1, [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".strides",
                   .expected = "a contiguous last dimension",
                   .got = "stride " + std::to_string(view.stride(last)),
                   .hint = "make a contiguous copy"};
  });
}

/// First and one-past-last byte that a view touches.
struct Extent {
  const std::byte* begin;
  const std::byte* end;
};
Extent extent_of(const ConstTensorView& view) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  std::int64_t low = 0, high = 0;
  for (int i = 0; i < view.rank; ++i) {
    const std::int64_t reach = (view.dim(i) - 1) * view.stride(i);
    (reach < 0 ? low : high) += reach;
  }
  const auto* data = static_cast<const std::byte*>(view.data);
  return {data + low * size, data + (high + 1) * size};
}

void check_no_overlap(const char* operation, const ConstTensorView& x, const ConstTensorView& out) {
  if (x.empty() || out.empty()) return;
  const Extent a = extent_of(x), b = extent_of(out);
  require<ShapeError>(a.end <= b.begin || b.end <= a.begin, [&] {
    return Problem{.operation = operation,
                   .what = "out",
                   .expected = "memory apart from x",
                   .got = "overlapping memory",
                   .hint = "the forward cannot run in place"};
  });
}

void check_stack(const char* operation, const char* name, const ExpertStack& stack,
                 const Activation& activation) {
  require<ShapeError>(stack.gated() == activation.gated(), [&] {
    return Problem{.operation = operation,
                   .what = name,
                   .expected = std::string(activation.gated() ? "a" : "no") +
                               " gate tensor for activation " + name_of(activation.kind),
                   .got = stack.gated() ? "one" : "none",
                   .hint = {}};
  });
}

void check_shared(const char* operation, const LayerRef& layer) {
  if (layer.shared == nullptr) return;
  const StackShape& shape = layer.shared->stack.shape();
  const std::int64_t hidden = layer.stack->shape().hidden_size;
  require<ShapeError>(shape.num_experts == 1 && shape.hidden_size == hidden, [&] {
    return Problem{
        .operation = operation,
        .what = "shared experts",
        .expected = "one expert of hidden size " + std::to_string(hidden),
        .got = std::to_string(shape.num_experts) + " of " + std::to_string(shape.hidden_size),
        .hint = {}};
  });
  const auto gate = static_cast<std::int64_t>(layer.shared->gate.size());
  require<ShapeError>(gate == 0 || gate == hidden, [&] {
    return Problem{.operation = operation,
                   .what = "shared gate",
                   .expected = "no elements or " + std::to_string(hidden),
                   .got = std::to_string(gate),
                   .hint = {}};
  });
  check_stack(operation, "shared experts", layer.shared->stack, layer.activation);
}

/// A routing in the caller's memory, given or to be filled.
void check_routing_view(const char* operation, const char* name, const RoutingView& routing,
                        std::int64_t num_tokens) {
  require<ShapeError>(
      routing.num_tokens == num_tokens && routing.top_k >= 1 && routing.topk_weights != nullptr,
      [&] {
        return Problem{.operation = operation,
                       .what = name,
                       .expected = "ids and weights [" + std::to_string(num_tokens) + ", top_k]",
                       .got = std::string(routing.topk_weights != nullptr ? "" : "no weights, ") +
                              "[" + std::to_string(routing.num_tokens) + ", " +
                              std::to_string(routing.top_k) + "]",
                       .hint = {}};
      });
}

/// The router of the layer, for logits from outside or its own.
void check_router(const char* operation, DeviceType device, const LayerRef& layer,
                  const ForwardIo& io) {
  const std::int32_t experts = layer.stack->num_experts();
  require<ConfigError>(layer.router != nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "router",
                   .expected = "a RouterConfig",
                   .got = "none",
                   .hint = "or give a routing"};
  });
  require<ShapeError>(layer.router->num_experts == experts, [&] {
    return Problem{.operation = operation,
                   .what = "router.num_experts",
                   .expected = std::to_string(experts),
                   .got = std::to_string(layer.router->num_experts),
                   .hint = {}};
  });
  layer.router->validate();
  require<UnsupportedError>(layer.router->weight_on == WeightOn::Output, [&] {
    return Problem{.operation = operation,
                   .what = "router.weight_on",
                   .expected = "output",
                   .got = "input",
                   .hint = "weights on the expert's input (Llama-4) are not available"};
  });
  if (io.logits.data != nullptr) {
    check_shape(operation, "logits", io.logits, {io.x.dim(0), experts});
    require<DTypeError>(io.logits.dtype == DType::F32, [&] {
      return Problem{.operation = operation,
                     .what = "logits.dtype",
                     .expected = "f32",
                     .got = name_of(io.logits.dtype),
                     .hint = {}};
    });
    require<DeviceError>(io.logits.device.type == device, [&] {
      return Problem{.operation = operation,
                     .what = "logits.device",
                     .expected = to_string({device, 0}),
                     .got = to_string(io.logits.device),
                     .hint = {}};
    });
    check_contiguous_rows(operation, "logits", io.logits);
    return;
  }
  const auto weights =
      layer.router_weight == nullptr ? 0 : static_cast<std::int64_t>(layer.router_weight->size());
  const std::int64_t expected = experts * layer.stack->shape().hidden_size;
  require<ShapeError>(weights == expected, [&] {
    return Problem{.operation = operation,
                   .what = "router weight",
                   .expected = std::to_string(expected) + " elements [E, H]",
                   .got = std::to_string(weights),
                   .hint = "a layer without a router needs logits or a routing"};
  });
}

}  // namespace

void check_float_tensor(const char* operation, const char* name, DeviceType device,
                        const ConstTensorView& view) {
  require<DTypeError>(
      view.dtype == DType::F32 || view.dtype == DType::F16 || view.dtype == DType::BF16, [&] {
        return Problem{.operation = operation,
                       .what = std::string(name) + ".dtype",
                       .expected = "f32, f16 or bf16",
                       .got = name_of(view.dtype),
                       .hint = {}};
      });
  require<DeviceError>(view.device.type == device, [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".device",
                   .expected = to_string({device, 0}),
                   .got = to_string(view.device),
                   .hint = {}};
  });
}

void check_dense(const char* operation, const char* name, DeviceType device,
                 const ConstTensorView& view, DType dtype,
                 std::initializer_list<std::int64_t> dims) {
  check_shape(operation, name, view, dims);
  require<DTypeError>(view.dtype == dtype, [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".dtype",
                   .expected = name_of(dtype),
                   .got = name_of(view.dtype),
                   .hint = {}};
  });
  require<DeviceError>(view.device.type == device, [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".device",
                   .expected = to_string({device, 0}),
                   .got = to_string(view.device),
                   .hint = {}};
  });
  std::int64_t step = 1;
  bool dense = true;
  for (int i = view.rank - 1; i >= 0; --i) {
    dense = dense && (view.dim(i) <= 1 || view.stride(i) == step);
    step *= view.dim(i);
  }
  require<ShapeError>(dense || view.empty(), [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".strides",
                   .expected = "a dense row-major tensor",
                   .got = "strided",
                   .hint = "make a contiguous copy"};
  });
}

void check_out(const char* operation, DeviceType device, const ConstTensorView& out,
               std::int64_t rows, std::int64_t cols) {
  check_shape(operation, "out", out, {rows, cols});
  check_float_tensor(operation, "out", device, out);
  check_contiguous_rows(operation, "out", out);
  require<ShapeError>(out.empty() || rows == 1 || out.stride(0) >= cols, [&] {
    return Problem{.operation = operation,
                   .what = "out.strides",
                   .expected = "rows that do not overlap",
                   .got = "row stride " + std::to_string(out.stride(0)),
                   .hint = {}};
  });
}

CallSizes check_forward(const char* operation, DeviceType device, const LayerRef& layer,
                        const ForwardIo& io) {
  require<ShapeError>(layer.stack != nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "stack",
                   .expected = "an ExpertStack",
                   .got = "none",
                   .hint = {}};
  });
  const StackShape& shape = layer.stack->shape();
  check_stack(operation, "stack", *layer.stack, layer.activation);
  check_shared(operation, layer);

  require<ShapeError>(io.x.rank == 2 && io.x.dim(1) == shape.hidden_size, [&] {
    return Problem{.operation = operation,
                   .what = "x.shape",
                   .expected = "[T, " + std::to_string(shape.hidden_size) + "]",
                   .got = describe(io.x),
                   .hint = {}};
  });
  CallSizes sizes;
  sizes.num_tokens = io.x.dim(0);
  check_shape(operation, "x", io.x, {sizes.num_tokens, shape.hidden_size});
  check_float_tensor(operation, "x", device, io.x);
  check_contiguous_rows(operation, "x", io.x);
  check_out(operation, device, io.out, sizes.num_tokens, shape.hidden_size);
  check_no_overlap(operation, io.x, io.out);

  const bool has_routing = io.routing.topk_ids != nullptr;
  require<ConfigError>(!has_routing || io.logits.data == nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "logits and routing",
                   .expected = "one of them",
                   .got = "both",
                   .hint = {}};
  });
  if (has_routing) {
    check_routing_view(operation, "routing", io.routing, sizes.num_tokens);
    sizes.top_k = io.routing.top_k;
  } else if (sizes.num_tokens > 0) {
    check_router(operation, device, layer, io);
    sizes.top_k = layer.router->top_k;
  }
  require<ShapeError>(sizes.num_tokens <= kMaxPairs / std::max<std::int64_t>(sizes.top_k, 1), [&] {
    return Problem{.operation = operation,
                   .what = "x.shape[0]",
                   .expected = "at most " + std::to_string(kMaxPairs) + " token-expert pairs",
                   .got = std::to_string(sizes.num_tokens) + " tokens",
                   .hint = "split the batch"};
  });
  sizes.num_pairs = sizes.num_tokens * sizes.top_k;
  // Ids in device memory are the business of the backend's plan.
  if (has_routing && device == DeviceType::Cpu) {
    check_ids(io.routing, shape.num_experts, operation);
  }
  if (io.routing_out.topk_ids != nullptr && sizes.num_tokens > 0) {
    check_routing_view(operation, "routing_out", io.routing_out, sizes.num_tokens);
    require<ShapeError>(io.routing_out.top_k == sizes.top_k, [&] {
      return Problem{.operation = operation,
                     .what = "routing_out.top_k",
                     .expected = std::to_string(sizes.top_k),
                     .got = std::to_string(io.routing_out.top_k),
                     .hint = {}};
    });
  }
  return sizes;
}

void check_supported(const char* operation, const Context& context, const LayerRef& layer) {
  const bool strict = context.tuning().strict;
  for (const ExpertStack* stack :
       {layer.stack, layer.shared != nullptr ? &layer.shared->stack : nullptr}) {
    if (stack == nullptr) continue;
    for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
      const WeightRef& ref = stack->role(role).ref;
      if (!ref) continue;
      const Support support = context.backend().supports(ref);
      require<UnsupportedError>(support.ok && (!strict || support.reason.empty()), [&] {
        return Problem{
            .operation = operation,
            .what = std::string(name_of(role)) + " weights",
            .expected = strict ? "a type with its own kernel (strict)" : "a type that runs",
            .got = std::string(traits(ref.type).name) + ": " + std::string(support.reason),
            .hint = {}};
      });
    }
  }
}

}  // namespace moesaic::forward
