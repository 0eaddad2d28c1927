/// PoolStats and ExpertUsage: what a pool counted.

#include "expert_pool.hpp"
#include "fields.hpp"

namespace moesaic::python {
namespace {

/// The usage of its fields. Throws ShapeError where they do not fit together.
py::object make_usage(const py::dict& values) {
  check_fields(values, "ExpertUsage",
               {"forwards", "tokens", "interval", "counts", "history", "coactivation"});
  const auto array = [&](const char* name) -> std::vector<std::int64_t> {
    const py::object value = values[name];
    if (value.is_none()) return {};
    return py::array_t<std::int64_t>(value).attr("ravel")().cast<std::vector<std::int64_t>>();
  };
  return py::cast(
      ExpertUsage({values["forwards"].cast<std::int64_t>(), values["tokens"].cast<std::int64_t>(),
                   values["interval"].cast<std::int64_t>(), array("counts"), array("history"),
                   array("coactivation")}));
}

}  // namespace

void bind_pool_stats(py::module_& m) {
  py::class_<PoolStats> stats(m, "PoolStats", py::is_final());
  stats.def_property_readonly("hit_rate", &PoolStats::hit_rate)
      .def("__repr__", [](const PoolStats& s) {
        return "moesaic.PoolStats(forwards=" + std::to_string(s.forwards) +
               ", hit_rate=" + std::to_string(s.hit_rate()) + ", bytes=" + std::to_string(s.bytes) +
               ")";
      });
  define_value(stats, Fields<PoolStats>("PoolStats")
                          .add("forwards", &PoolStats::forwards)
                          .add("refreshes", &PoolStats::refreshes)
                          .add("promotions", &PoolStats::promotions)
                          .add("demotions", &PoolStats::demotions)
                          .add("hit_experts", &PoolStats::hit_experts)
                          .add("miss_experts", &PoolStats::miss_experts)
                          .add("hit_pairs", &PoolStats::hit_pairs)
                          .add("miss_pairs", &PoolStats::miss_pairs)
                          .add("staged", &PoolStats::staged)
                          .add("streamed", &PoolStats::streamed)
                          .add("bytes", &PoolStats::bytes));

  py::class_<ExpertUsage> usage(m, "ExpertUsage", py::is_final());
  usage.def("__repr__", [](const ExpertUsage& u) {
    return "moesaic.ExpertUsage(forwards=" + std::to_string(u.forwards()) +
           ", tokens=" + std::to_string(u.tokens()) + ")";
  });
  define_value(usage,
               Fields<ExpertUsage>("ExpertUsage")
                   .view("forwards", [](const ExpertUsage& u) { return py::int_(u.forwards()); })
                   .view("tokens", [](const ExpertUsage& u) { return py::int_(u.tokens()); })
                   .view("counts", [](const ExpertUsage& u) { return copied(u.counts()); })
                   .view("interval", [](const ExpertUsage& u) { return py::int_(u.interval()); })
                   .view("history",
                         [](const ExpertUsage& u) {
                           const auto rows =
                               static_cast<py::ssize_t>(u.history().size()) / u.num_experts();
                           return copied(u.history(), {rows, u.num_experts()});
                         })
                   .view("coactivation",
                         [](const ExpertUsage& u) -> py::object {
                           if (u.coactivation().empty()) return py::none();
                           return copied(u.coactivation(), {u.num_experts(), u.num_experts()});
                         }),
               {.make = &make_usage});
}

}  // namespace moesaic::python
