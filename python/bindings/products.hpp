#pragma once

/// What products of an array with weights have in common, those of ExpertStack as those of
/// MarlinExpertStack.

#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "calls.hpp"
#include "devices.hpp"
#include "gil.hpp"
#include "result.hpp"

namespace moesaic::python {

/// The arguments of a product that Python gave and that do not depend on the weights.
struct ProductArguments {
  const char* operation;
  const py::object& x;
  const py::object& out;
  const std::optional<std::string>& precision;
  DeviceStream target;
};

/// Calls run(context, x, out) without the GIL, with an f32 `out` of `shape`, and returns that.
/// `in` is x, already imported, and `rows` its view as the product takes it.
template <class Run>
py::object run_product(const ProductArguments& arguments, const ArrayRef& in,
                       const ConstTensorView& rows, const std::vector<std::int64_t>& shape,
                       Run&& run) {
  const auto& [operation, x, out, precision, target] = arguments;
  Result result(x, in, DType::F32, shape, out, operation, false, target);
  Call call(parse_precision(precision, operation), target.device);
  call.context.set_stream(target.stream);
  {
    const InterruptibleRelease release;
    run(call.context, rows, result.view());
  }
  return result.finish();
}

}  // namespace moesaic::python
