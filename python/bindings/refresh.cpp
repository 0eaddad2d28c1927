/// RefreshPolicy and RefreshResult: when a pool is due, and what it then decides.

#include <pybind11/stl.h>

#include <array>

#include "expert_pool.hpp"
#include "fields.hpp"

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
      return "every_steps(" + std::to_string(policy.steps) + ")";
  }
}

py::list load_tuples(const std::vector<SlotLoad>& loads) {
  py::list list;
  for (const SlotLoad& load : loads) {
    list.append(py::make_tuple(load.expert, load.slot, load.evicted));
  }
  return list;
}

template <>
struct FieldCast<std::vector<SlotLoad>> {
  static py::object to(const std::vector<SlotLoad>& loads) { return load_tuples(loads); }
  static std::vector<SlotLoad> from(py::handle object, const char*, const char*) {
    std::vector<SlotLoad> loads;
    for (const auto& [expert, slot, evicted] :
         object.cast<std::vector<std::array<std::int32_t, 3>>>()) {
      loads.push_back({expert, slot, evicted});
    }
    return loads;
  }
};

void bind_refresh(py::module_& m) {
  py::class_<RefreshPolicy> policy(m, "RefreshPolicy", py::is_final());
  policy.def_static("every_forward", &RefreshPolicy::every_forward)
      .def_static("every_decode_steps", &RefreshPolicy::every_decode_steps, py::arg("n"))
      .def_static("every_steps", &RefreshPolicy::every_steps, py::arg("n"))
      .def_static("manual", &RefreshPolicy::manual)
      .def("__repr__",
           [](const RefreshPolicy& p) { return "moesaic.RefreshPolicy." + text_of(p); });
  define_value(policy,
               Fields<RefreshPolicy>("RefreshPolicy")
                   .add("every", &RefreshPolicy::every)
                   .add("steps", &RefreshPolicy::steps),
               {.from_dict = true});

  py::class_<RefreshResult> result(m, "RefreshResult", py::is_final());
  result
      .def_property_readonly("promotions",
                             [](const RefreshResult& r) {
                               std::vector<std::int32_t> experts;
                               for (const SlotLoad& load : r.promotions)
                                 experts.push_back(load.expert);
                               return experts;
                             })
      .def("__bool__", [](const RefreshResult& r) { return r.refreshed; })
      .def("__repr__", [](const RefreshResult& r) {
        return "moesaic.RefreshResult(promotions=" + std::to_string(r.promotions.size()) +
               ", demotions=" + std::to_string(r.demotions.size()) +
               ", bytes=" + std::to_string(r.bytes) + ")";
      });
  define_value(result, Fields<RefreshResult>("RefreshResult")
                           .add("refreshed", &RefreshResult::refreshed)
                           .add("target", &RefreshResult::target)
                           .add("loads", &RefreshResult::promotions)
                           .add("demotions", &RefreshResult::demotions)
                           .add("bytes", &RefreshResult::bytes));
}

}  // namespace moesaic::python
