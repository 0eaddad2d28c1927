/// The small operations that the forward is made of.

#include <pybind11/stl.h>

#include <optional>

#include "arrays.hpp"
#include "calls.hpp"
#include "devices.hpp"
#include "dlpack.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "moesaic/forward.hpp"
#include "result.hpp"
#include "routing.hpp"

namespace moesaic::python {
namespace {

/// The size of the last dimension. Throws ShapeError for an array of fewer than two.
std::int64_t last_dim(const ConstTensorView& view, const char* operation, const char* name) {
  require<ShapeError>(view.rank >= 2,
                      [&] { return Problem{operation, name, "a matrix", describe(view), {}}; });
  return view.dim(view.rank - 1);
}

TokenRows import_values(py::handle object, const char* operation, const char* name,
                        const DeviceStream& target) {
  ArrayRef ref = import_f32(object, operation, name, target, RowLayout::Dense);
  const TensorView view = ref.view;
  return {std::move(ref), view};
}

/// An operation on one array, on the device where that lies.
class Operation {
 public:
  /// `import` is import_tokens for what is read as it is, import_values for what is read as f32.
  template <class Import>
  Operation(const char* operation, const char* name, const py::object& x, const py::object& stream,
            Import&& import)
      : operation_(operation),
        name_(name),
        x_(x),
        target_(device_stream(device_of(x, operation, name), stream, x, operation)),
        in_(import(x, operation, name, target_)) {}

  ConstTensorView in() const { return in_.rows; }
  std::int64_t last_dim() const { return python::last_dim(in_.rows, operation_, name_); }

  /// Calls run(context, in, routing, out) without the GIL, with an f32 `out` of `shape`, and
  /// returns that; without a routing its view is empty.
  template <class Run>
  py::object apply(const std::vector<std::int64_t>& shape, const py::object& out, Run&& run,
                   bool accumulate = false, const RoutingObject* routing = nullptr) {
    require<ConfigError>(!accumulate || !out.is_none(), [&] {
      return Problem{operation_, "accumulate", "an out= to add to", "none", {}};
    });
    Call call({}, target_.device);
    call.context.set_stream(target_.stream);
    std::optional<CallRouting> held;
    if (routing != nullptr) held.emplace(*routing, target_, x_, call.context, operation_);
    Result result(x_, in_.array, DType::F32, shape, out, operation_, false, target_);
    {
      const InterruptibleRelease release;
      run(call.context, in_.rows, held ? held->view() : RoutingView{}, result.view());
    }
    return result.finish();
  }

 private:
  const char* operation_;
  const char* name_;
  const py::object& x_;
  DeviceStream target_;
  TokenRows in_;
};

py::object gather(const py::object& x, const PlanObject& plan, const py::object& out,
                  const py::object& stream) {
  Operation operation("gather_rows", "x", x, stream, import_tokens);
  const auto held = plan.value;
  return operation.apply({held->num_pairs(), operation.last_dim()}, out,
                         [&](Context& context, const ConstTensorView& from, const RoutingView&,
                             const TensorView& to) { gather_rows(context, from, *held, to); });
}

py::object multiply(const py::object& gate_up, const py::object& out, const py::object& stream) {
  Operation operation("silu_mul", "gate_up", gate_up, stream, import_values);
  const std::int64_t cols = operation.last_dim();
  require<ShapeError>(cols % 2 == 0, [&] {
    return Problem{"silu_mul",
                   "gate_up",
                   "an even last dimension, gate then up",
                   describe(operation.in()),
                   {}};
  });
  return operation.apply({operation.in().dim(0), cols / 2}, out,
                         [&](Context& context, const ConstTensorView& from, const RoutingView&,
                             const TensorView& to) { silu_mul(context, from, to); });
}

py::object combine_rows(const py::object& rows, const PlanObject& plan,
                        const RoutingObject& routing, const py::object& out, bool accumulate,
                        const py::object& stream) {
  Operation operation("combine", "rows", rows, stream, import_values);
  const auto held = plan.value;
  return operation.apply(
      {routing.num_tokens(), operation.last_dim()}, out,
      [&](Context& context, const ConstTensorView& from, const RoutingView& view,
          const TensorView& to) { combine(context, from, *held, view, to, accumulate); },
      accumulate, &routing);
}

py::object sum_pairs(const py::object& pairs, const RoutingObject& routing, const py::object& out,
                     bool accumulate, const py::object& stream) {
  Operation operation("weighted_sum", "pairs", pairs, stream, import_values);
  return operation.apply(
      {routing.num_tokens(), operation.last_dim()}, out,
      [&](Context& context, const ConstTensorView& from, const RoutingView& view,
          const TensorView& to) { weighted_sum(context, from, view, to, accumulate); },
      accumulate, &routing);
}

}  // namespace

void bind_operations(py::module_& m) {
  m.def("gather_rows", &gather, py::arg("x"), py::arg("plan"), py::kw_only(),
        py::arg("out") = py::none(), py::arg("stream") = py::none());
  m.def("silu_mul", &multiply, py::arg("gate_up"), py::kw_only(), py::arg("out") = py::none(),
        py::arg("stream") = py::none());
  m.def("combine", &combine_rows, py::arg("rows"), py::arg("plan"), py::arg("routing"),
        py::kw_only(), py::arg("out") = py::none(), py::arg("accumulate") = false,
        py::arg("stream") = py::none());
  m.def("weighted_sum", &sum_pairs, py::arg("pairs"), py::arg("routing"), py::kw_only(),
        py::arg("out") = py::none(), py::arg("accumulate") = false, py::arg("stream") = py::none());
}

}  // namespace moesaic::python
