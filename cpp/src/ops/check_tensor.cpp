#include "ops/check_tensor.hpp"

#include "moesaic/error.hpp"

namespace moesaic::ops {
namespace {

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

void check_data(const char* operation, const char* name, const ConstTensorView& view) {
  require<ShapeError>(view.data != nullptr || view.empty(), [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".data",
                   .expected = "memory for " + describe(view),
                   .got = "null",
                   .hint = {}};
  });
}

void check_device(const char* operation, const char* name, Device device,
                  const ConstTensorView& view) {
  require<DeviceError>(view.device == device, [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".device",
                   .expected = to_string(device),
                   .got = to_string(view.device),
                   .hint = {}};
  });
}

}  // namespace

void wrong_shape(const char* operation, const char* name, const std::string& expected,
                 const ConstTensorView& got) {
  throw ShapeError(Problem{.operation = operation,
                           .what = std::string(name) + ".shape",
                           .expected = expected,
                           .got = describe(got),
                           .hint = {}});
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
  check_data(operation, name, view);
}

void check_input(const char* operation, const char* name, Device device,
                 const ConstTensorView& view) {
  require<DTypeError>(
      view.dtype == DType::F32 || view.dtype == DType::F16 || view.dtype == DType::BF16, [&] {
        return Problem{.operation = operation,
                       .what = std::string(name) + ".dtype",
                       .expected = "f32, f16 or bf16",
                       .got = name_of(view.dtype),
                       .hint = {}};
      });
  check_device(operation, name, device, view);
  check_data(operation, name, view);
  const int last = view.rank - 1;
  require<ShapeError>(view.empty() || view.dim(last) == 1 || view.stride(last) == 1, [&] {
    return Problem{.operation = operation,
                   .what = std::string(name) + ".strides",
                   .expected = "a contiguous last dimension",
                   .got = "stride " + std::to_string(view.stride(last)),
                   .hint = "make a contiguous copy"};
  });
}

void check_dense(const char* operation, const char* name, Device device,
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
  check_device(operation, name, device, view);
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

void check_out(const char* operation, Device device, const ConstTensorView& out, std::int64_t rows,
               std::int64_t cols) {
  check_shape(operation, "out", out, {rows, cols});
  check_input(operation, "out", device, out);
  require<ShapeError>(out.empty() || rows == 1 || out.stride(0) >= cols, [&] {
    return Problem{.operation = operation,
                   .what = "out.strides",
                   .expected = "rows that do not overlap",
                   .got = "row stride " + std::to_string(out.stride(0)),
                   .hint = {}};
  });
}

void check_apart(const char* operation, const char* name, const ConstTensorView& in,
                 const ConstTensorView& out) {
  require<ShapeError>(!overlap(in, out), [&] {
    return Problem{.operation = operation,
                   .what = "out",
                   .expected = "memory of its own",
                   .got = std::string("memory shared with ") + name,
                   .hint = "operations do not run in place"};
  });
}

void check_weights(const char* operation, const Context& context, const std::string& what,
                   const WeightRef& weights, Device lies_on, const char* hint) {
  const Backend& backend = context.backend();
  require<DeviceError>(lies_on == backend.device(), [&] {
    return Problem{.operation = operation,
                   .what = what,
                   .expected = "on " + to_string(backend.device()),
                   .got = to_string(lies_on),
                   .hint = hint};
  });
  const bool strict = context.tuning().strict;
  const Support support = backend.supports(weights);
  require<UnsupportedError>(support.ok && (!strict || support.reason.empty()), [&] {
    return Problem{
        .operation = operation,
        .what = what,
        .expected = strict ? "a type with its own kernel (strict)" : "a type that runs",
        .got = std::string(traits(weights.type).name) + ": " + std::string(support.reason),
        .hint = {}};
  });
}

}  // namespace moesaic::ops
