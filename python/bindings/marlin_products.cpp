/// The products of MarlinExpertStack: over dispatches, and over aligned blocks.

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "marlin.hpp"
#include "moesaic/plan.hpp"
#include "ops/call_memory.hpp"
#include "products.hpp"

namespace moesaic::python {
namespace {

using DispatchTuple = std::tuple<std::int32_t, std::int64_t, std::int64_t, std::int64_t>;

std::vector<MarlinDispatch> dispatch_list(const std::vector<DispatchTuple>& dispatches,
                                          const char* operation) {
  std::vector<MarlinDispatch> list;
  for (const auto& [expert, in_row, out_row, count] : dispatches) {
    require<ShapeError>(in_row >= 0 && out_row >= 0 && count >= 0 && in_row <= INT32_MAX &&
                            out_row <= INT32_MAX && count <= INT32_MAX,
                        [&] {
                          return Problem{
                              operation,
                              "dispatches",
                              "(expert, in_row, out_row, rows), none negative",
                              "(" + std::to_string(expert) + ", " + std::to_string(in_row) + ", " +
                                  std::to_string(out_row) + ", " + std::to_string(count) + ")",
                              {}};
                        });
    list.push_back({expert, in_row, out_row, count});
  }
  return list;
}

/// How many rows a new result has: up to the last one that a dispatch names.
std::int64_t rows_named(const std::vector<MarlinDispatch>& list, std::int64_t in_rows,
                        const char* operation) {
  std::int64_t rows = 0, named = 0;
  for (const MarlinDispatch& d : list) {
    rows = std::max(rows, d.out_row + d.rows);
    named += d.rows;
  }
  // A mistyped out_row would ask for any amount of memory, so gaps between the rows that dispatches
  // name may hold no more rows than x has.
  require<ShapeError>(rows <= named + in_rows, [&] {
    return Problem{operation,
                   "dispatches",
                   "output rows next to each other, or an out=",
                   "row " + std::to_string(rows - 1) + " of " + std::to_string(named),
                   {}};
  });
  return rows;
}

py::object phase_batched(const MarlinExpertStack& stack, const py::object& x,
                         const std::vector<DispatchTuple>& dispatches, const py::object& out,
                         const std::optional<std::string>& precision, const py::object& stream) {
  constexpr const char* kOperation = "MarlinExpertStack.gemm_phase_batched";
  const DeviceStream target = device_stream(stack.device(), stream, x, kOperation);
  const ArrayRef in = import_rows(x, kOperation, "x_packed", target);
  const std::vector<MarlinDispatch> list = dispatch_list(dispatches, kOperation);
  const bool fresh = out.is_none();
  std::int64_t rows = 0;
  if (fresh) {
    rows = rows_named(list, in.view.rank == 2 ? in.view.dim(0) : 0, kOperation);
  } else {
    const ArrayRef given = import_array(out, kOperation, "out", target);
    if (given.view.rank == 2) rows = given.view.dim(0);
  }
  return run_product(
      {kOperation, x, out, precision, stack.device(), target}, in, in.read(),
      {rows, stack.n_per_expert()},
      [&](Context& context, HostArrays&, const ConstTensorView& from, const TensorView& to) {
        if (fresh && !to.empty()) {
          ops::require_no_capture(kOperation, context, "dispatches");
          const auto bytes = static_cast<std::size_t>(to.num_elements()) * sizeof(float);
          context.backend().fill(
              context, {.data = to.data, .bytes = static_cast<std::int64_t>(bytes), .value = 0});
        }
        stack.gemm_phase_batched(context, from, list, to);
      });
}

py::object phase_vllm(const MarlinExpertStack& stack, const py::object& x,
                      const std::shared_ptr<AlignedRouting>& aligned, std::int32_t top_k,
                      const py::object& out, const std::optional<std::string>& precision,
                      const py::object& stream) {
  constexpr const char* kOperation = "MarlinExpertStack.gemm_phase_vllm";
  const DeviceStream target = device_stream(stack.device(), stream, x, kOperation);
  const ArrayRef in = import_rows(x, kOperation, "x", target);
  return run_product(
      {kOperation, x, out, precision, stack.device(), target}, in, in.read(),
      {aligned->num_pairs(), stack.n_per_expert()},
      [&](Context& context, HostArrays&, const ConstTensorView& from, const TensorView& to) {
        stack.gemm_phase_vllm(context, from, *aligned, top_k, to);
      });
}

}  // namespace

void define_marlin_products(MarlinClass& type) {
  type.def("gemm_phase_batched", &phase_batched, py::arg("x_packed"), py::arg("dispatches"),
           py::kw_only(), py::arg("out") = py::none(), py::arg("precision") = py::none(),
           py::arg("stream") = py::none())
      .def("gemm_phase_vllm", &phase_vllm, py::arg("x"), py::arg("aligned").none(false),
           py::arg("top_k"), py::kw_only(), py::arg("out") = py::none(),
           py::arg("precision") = py::none(), py::arg("stream") = py::none());
}

}  // namespace moesaic::python
