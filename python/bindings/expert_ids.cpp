#include "expert_ids.hpp"

#include <pybind11/stl.h>

#include <string>

#include "values.hpp"

namespace moesaic::python {
namespace {

/// An array of numpy that says of each expert whether it is meant.
bool is_mask(const py::object& ids) {
  return py::isinstance<py::array>(ids) &&
         py::reinterpret_borrow<py::array>(ids).dtype().kind() == 'b';
}

}  // namespace

std::vector<std::int32_t> import_expert_ids(const py::object& ids, const char* operation,
                                            const char* name) {
  if (py::isinstance<py::list>(ids) || py::isinstance<py::tuple>(ids) || PyRange_Check(ids.ptr())) {
    try {
      return ids.cast<std::vector<std::int32_t>>();
    } catch (const py::cast_error&) {
      throw DTypeError(Problem{operation, name, "whole numbers", "others", {}});
    }
  }
  require<DTypeError>(!is_mask(ids), [&] {
    return Problem{operation, name, "int32 or int64", "bool",
                   "numpy.flatnonzero(mask) are the ids"};
  });
  const Ids array = import_ids(ids, operation, name);
  require<ShapeError>(array.view.rank == 1,
                      [&] { return Problem{operation, name, "[n]", describe(array.view), {}}; });
  const auto* const data = static_cast<const std::int32_t*>(array.view.data);
  return {data, data + array.view.num_elements()};
}

void check_experts(const std::vector<std::int32_t>& ids, std::int32_t experts,
                   const char* operation) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    require<ShapeError>(ids[i] >= 0 && ids[i] < experts, [&] {
      return Problem{operation,
                     "ids[" + std::to_string(i) + "]",
                     "0 to " + std::to_string(experts - 1),
                     std::to_string(ids[i]),
                     {}};
    });
  }
}

void check_permutation(const std::vector<std::int32_t>& order, std::int32_t experts,
                       const char* operation) {
  std::vector<bool> seen(static_cast<std::size_t>(experts), false);
  const auto problem = [&](std::string got) {
    return Problem{operation, "order", "each of 0 to " + std::to_string(experts - 1) + " once",
                   std::move(got), "select() takes any experts"};
  };
  require<ShapeError>(order.size() == seen.size(),
                      [&] { return problem(std::to_string(order.size()) + " ids"); });
  for (const std::int32_t e : order) {
    require<ShapeError>(e >= 0 && e < experts && !seen[static_cast<std::size_t>(e)],
                        [&] { return problem(std::to_string(e)); });
    seen[static_cast<std::size_t>(e)] = true;
  }
}

}  // namespace moesaic::python
