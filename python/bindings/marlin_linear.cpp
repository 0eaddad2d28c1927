/// MarlinLinear: columns of one INT4 expert.

#include <pybind11/stl.h>

#include "bindings.hpp"
#include "moesaic/marlin_stack.hpp"
#include "products.hpp"

namespace moesaic::python {
namespace {

py::object call_linear(const MarlinLinear& linear, const py::object& x, const py::object& out,
                       const std::optional<std::string>& precision, const py::object& stream) {
  constexpr const char* kOperation = "MarlinLinear";
  const DeviceStream target = device_stream(linear.device(), stream, x, kOperation);
  const ArrayRef in = import_rows(x, kOperation, "x", target);
  const std::int64_t rows = in.view.rank == 2 ? in.view.dim(0) : 0;
  return run_product({kOperation, x, out, precision, linear.device(), target}, in, in.read(),
                     {rows, linear.out_features()},
                     [&](Context& context, HostArrays&, const ConstTensorView& from,
                         const TensorView& to) { linear.forward(context, from, to); });
}

}  // namespace

void bind_marlin_linear(py::module_& m) {
  py::class_<MarlinLinear>(m, "MarlinLinear", py::is_final())
      .def_property_readonly("in_features", &MarlinLinear::in_features)
      .def_property_readonly("out_features", &MarlinLinear::out_features)
      .def("__call__", &call_linear, py::arg("x"), py::kw_only(), py::arg("out") = py::none(),
           py::arg("precision") = py::none(), py::arg("stream") = py::none())
      .def("__repr__", [](const MarlinLinear& l) {
        return "moesaic.MarlinLinear(in_features=" + std::to_string(l.in_features()) +
               ", out_features=" + std::to_string(l.out_features()) + ")";
      });
}

}  // namespace moesaic::python
