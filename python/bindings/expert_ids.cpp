#include "expert_ids.hpp"

#include <pybind11/stl.h>

#include <string>

#include "values.hpp"

namespace moesaic::python {

std::vector<std::int32_t> import_expert_ids(const py::object& ids, const char* operation,
                                            const char* name) {
  if (py::isinstance<py::list>(ids) || py::isinstance<py::tuple>(ids) || PyRange_Check(ids.ptr())) {
    try {
      return ids.cast<std::vector<std::int32_t>>();
    } catch (const py::cast_error&) {
      throw DTypeError(Problem{operation, name, "whole numbers", "others", {}});
    }
  }
  const Ids array = import_ids(ids, operation, name);
  require<ShapeError>(array.view.rank == 1,
                      [&] { return Problem{operation, name, "[n]", describe(array.view), {}}; });
  const auto* const data = static_cast<const std::int32_t*>(array.view.data);
  return {data, data + array.view.num_elements()};
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
