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
#include "host_arrays.hpp"
#include "result.hpp"

namespace moesaic::python {

/// The arguments of a product that Python gave and that do not depend on the weights.
struct ProductArguments {
  const char* operation;
  const py::object& x;
  const py::object& out;
  const std::optional<std::string>& precision;
  Device device;        ///< of the weights
  DeviceStream target;  ///< of the arrays
};

/// Calls run(context, arrays, x, out) without the GIL, with an f32 `out` of `shape`, and returns that.
/// `in` is x, already imported, and `rows` its view as the product takes it; `arrays` takes what else
/// the launches read.
template <class Run>
py::object run_product(const ProductArguments& arguments, const ArrayRef& in,
                       const ConstTensorView& rows, const std::vector<std::int64_t>& shape,
                       Run&& run) {
  const auto& [operation, x, out, precision, device, target] = arguments;
  Result result(x, in, DType::F32, shape, out, operation, false, target);
  Call call(parse_precision(precision, operation), device);
  call.context.set_stream(target.stream);
  {
    const InterruptibleRelease release;
    HostArrays arrays(call.context);
    const ConstTensorView from = arrays.read(rows);
    run(call.context, arrays, from, arrays.write(result.view()));
    arrays.finish();
  }
  return result.finish();
}

}  // namespace moesaic::python
