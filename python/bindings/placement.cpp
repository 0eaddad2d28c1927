/// Arithmetic about placements that needs no pool, or several.

#include <pybind11/stl.h>

#include "expert_pool.hpp"
#include "lists.hpp"

namespace moesaic::python {

void bind_placement(py::module_& m) {
  m.def(
      "target_from_counts",
      [](const std::vector<std::int64_t>& counts, std::int32_t budget) {
        return target_from_counts(counts, budget);
      },
      py::arg("counts"), py::arg("budget"));
  m.def(
      "merged_resident_mask",
      [](const std::vector<std::shared_ptr<ExpertPool>>& pools) {
        require_no_none(pools, "merged_resident_mask", "pools", "ExpertPool");
        std::vector<const ExpertPool*> pointers;
        for (const auto& pool : pools) pointers.push_back(pool.get());
        return copied_mask(merged_resident_mask(pointers));
      },
      py::arg("pools"));
}

}  // namespace moesaic::python
