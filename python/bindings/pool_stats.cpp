/// PoolStats and ExpertUsage: what a pool counted.

#include "expert_pool.hpp"

namespace moesaic::python {

void bind_pool_stats(py::module_& m) {
  py::class_<PoolStats>(m, "PoolStats", py::is_final())
      .def_readonly("forwards", &PoolStats::forwards)
      .def_readonly("refreshes", &PoolStats::refreshes)
      .def_readonly("promotions", &PoolStats::promotions)
      .def_readonly("demotions", &PoolStats::demotions)
      .def_readonly("hit_experts", &PoolStats::hit_experts)
      .def_readonly("miss_experts", &PoolStats::miss_experts)
      .def_readonly("hit_pairs", &PoolStats::hit_pairs)
      .def_readonly("miss_pairs", &PoolStats::miss_pairs)
      .def_readonly("staged", &PoolStats::staged)
      .def_readonly("streamed", &PoolStats::streamed)
      .def_readonly("bytes", &PoolStats::bytes)
      .def_property_readonly("hit_rate", &PoolStats::hit_rate)
      .def("__repr__", [](const PoolStats& s) {
        return "moesaic.PoolStats(forwards=" + std::to_string(s.forwards) +
               ", hit_rate=" + std::to_string(s.hit_rate()) + ", bytes=" + std::to_string(s.bytes) +
               ")";
      });

  py::class_<ExpertUsage>(m, "ExpertUsage", py::is_final())
      .def_property_readonly("forwards", &ExpertUsage::forwards)
      .def_property_readonly("tokens", &ExpertUsage::tokens)
      .def_property_readonly("counts", [](const ExpertUsage& u) { return copied(u.counts()); })
      .def_property_readonly("interval", &ExpertUsage::interval)
      .def_property_readonly("history",
                             [](const ExpertUsage& u) {
                               const auto rows =
                                   static_cast<py::ssize_t>(u.history().size()) / u.num_experts();
                               return copied(u.history(), {rows, u.num_experts()});
                             })
      .def_property_readonly("coactivation",
                             [](const ExpertUsage& u) -> py::object {
                               if (u.coactivation().empty()) return py::none();
                               return copied(u.coactivation(), {u.num_experts(), u.num_experts()});
                             })
      .def("__repr__", [](const ExpertUsage& u) {
        return "moesaic.ExpertUsage(forwards=" + std::to_string(u.forwards()) +
               ", tokens=" + std::to_string(u.tokens()) + ")";
      });
}

}  // namespace moesaic::python
