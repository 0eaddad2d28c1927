/// RefreshPolicy and RefreshResult: when a pool is due, and what it then decides.

#include <pybind11/stl.h>

#include "expert_pool.hpp"

namespace moesaic::python {

std::string text_of(const RefreshPolicy& policy) {
  using Every = RefreshPolicy::Every;
  switch (policy.every) {
    case Every::Forward:
      return "every_forward()";
    case Every::Manual:
      return "manual()";
    case Every::DecodeSteps:
      return "every_decode_steps(" + std::to_string(policy.steps) + ")";
    default:
      return "every_denoise_steps(" + std::to_string(policy.steps) + ")";
  }
}

py::list load_tuples(const std::vector<SlotLoad>& loads) {
  py::list list;
  for (const SlotLoad& load : loads) {
    list.append(py::make_tuple(load.expert, load.slot, load.evicted));
  }
  return list;
}

void bind_refresh(py::module_& m) {
  py::class_<RefreshPolicy>(m, "RefreshPolicy", py::is_final())
      .def_static("every_forward", &RefreshPolicy::every_forward)
      .def_static("every_decode_steps", &RefreshPolicy::every_decode_steps, py::arg("n"))
      .def_static("every_denoise_steps", &RefreshPolicy::every_denoise_steps, py::arg("n"))
      .def_static("manual", &RefreshPolicy::manual)
      .def_readonly("steps", &RefreshPolicy::steps)
      .def(
          "__eq__",
          [](const RefreshPolicy& a, const py::object& b) {
            return py::isinstance<RefreshPolicy>(b) && a == b.cast<const RefreshPolicy&>();
          },
          py::arg("other"))
      .def("__repr__",
           [](const RefreshPolicy& p) { return "moesaic.RefreshPolicy." + text_of(p); });

  py::class_<RefreshResult>(m, "RefreshResult", py::is_final())
      .def_readonly("refreshed", &RefreshResult::refreshed)
      .def_readonly("target", &RefreshResult::target)
      .def_property_readonly("promotions",
                             [](const RefreshResult& r) {
                               std::vector<std::int32_t> experts;
                               for (const SlotLoad& load : r.promotions)
                                 experts.push_back(load.expert);
                               return experts;
                             })
      .def_readonly("demotions", &RefreshResult::demotions)
      .def_property_readonly("loads",
                             [](const RefreshResult& r) { return load_tuples(r.promotions); })
      .def_readonly("bytes", &RefreshResult::bytes)
      .def("__bool__", [](const RefreshResult& r) { return r.refreshed; })
      .def("__repr__", [](const RefreshResult& r) {
        return "moesaic.RefreshResult(promotions=" + std::to_string(r.promotions.size()) +
               ", demotions=" + std::to_string(r.demotions.size()) +
               ", bytes=" + std::to_string(r.bytes) + ")";
      });
}

}  // namespace moesaic::python
