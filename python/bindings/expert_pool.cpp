/// ExpertPool: which experts have a slot in fast memory.

#include "expert_pool.hpp"

#include <pybind11/stl.h>

#include "offload.hpp"

namespace moesaic::python {
namespace {

using Pool = std::shared_ptr<ExpertPool>;

/// Calls use(span of all ids), whatever kind of array or list they come in.
template <class Use>
auto with_ids(const py::object& ids, const char* operation, Use&& use) {
  const Ids experts = import_id_list(ids, operation, "ids");
  return use(id_span(experts));
}

Pool make_pool(std::int32_t num_experts, std::int32_t budget,
               const std::optional<RefreshPolicy>& refresh, const std::string& ranking,
               double decay, double margin, std::int64_t min_dwell, bool admit, bool coactivation) {
  ExpertPoolConfig config;
  config.num_experts = num_experts;
  config.budget = budget;
  if (refresh) config.refresh = *refresh;
  config.ranking = parse_name<Ranking>(ranking, "ExpertPool", "ranking");
  config.decay = decay;
  config.margin = margin;
  config.min_dwell = min_dwell;
  config.admit = admit;
  return std::make_shared<ExpertPool>(config, coactivation);
}

}  // namespace

void bind_expert_pool(py::module_& m) {
  py::class_<ExpertPool, Pool>(m, "ExpertPool", py::is_final())
      .def(py::init(&make_pool), py::arg("num_experts"), py::arg("budget"),
           py::arg("refresh") = py::none(), py::kw_only(), py::arg("ranking") = "hits",
           py::arg("decay") = 0.0, py::arg("margin") = 0.0, py::arg("min_dwell") = 0,
           py::arg("admit") = true, py::arg("coactivation") = false)
      .def_static(
          "all_resident",
          [](std::int32_t num_experts) {
            return std::make_shared<ExpertPool>(ExpertPool::all_resident(num_experts));
          },
          py::arg("num_experts"))
      .def_property_readonly("num_experts", &ExpertPool::num_experts)
      .def_property_readonly("budget", &ExpertPool::budget)
      .def_property_readonly("offload_enabled", &ExpertPool::offload_enabled)
      .def_property_readonly("refresh_policy",
                             [](const ExpertPool& p) { return p.config().refresh; })
      .def_property_readonly("ranking",
                             [](const ExpertPool& p) { return name_of(p.config().ranking); })
      .def(
          "should_refresh",
          [](const ExpertPool& p, std::int64_t step, bool prefill, const std::string& mode) {
            return p.should_refresh(step, prefill, parse_mode(mode, "ExpertPool.should_refresh"));
          },
          py::arg("step"), py::arg("is_prefill_block") = false, py::arg("mode") = "reuse")
      .def(
          "observe",
          [](ExpertPool& p, const py::object& ids) {
            with_ids(ids, "ExpertPool.observe", [&](auto experts) { p.observe(experts); });
          },
          py::arg("ids"))
      .def("refresh", &ExpertPool::refresh)
      .def(
          "refresh_from_indices",
          [](ExpertPool& p, const py::object& ids) {
            return with_ids(ids, "ExpertPool.refresh_from_indices",
                            [&](auto experts) { return p.refresh_from_indices(experts); });
          },
          py::arg("ids"))
      .def(
          "apply_target",
          [](ExpertPool& p, const py::object& target) {
            return with_ids(target, "ExpertPool.apply_target",
                            [&](auto experts) { return p.apply_target(experts); });
          },
          py::arg("target"))
      .def(
          "stage",
          [](ExpertPool& p, const py::object& ids) {
            return with_ids(ids, "ExpertPool.stage",
                            [&](auto experts) { return load_tuples(p.stage(experts)); });
          },
          py::arg("ids"))
      .def(
          "warm", [](ExpertPool& p, const std::vector<double>& scores) { return p.warm(scores); },
          py::arg("scores"))
      .def("target", &ExpertPool::target)
      .def_property_readonly(
          "residents",
          [](const ExpertPool& p) { return copied(std::span<const std::int32_t>(p.residents())); })
      .def_property_readonly("resident_mask",
                             [](const ExpertPool& p) { return copied_mask(p.resident_mask()); })
      .def_property_readonly(
          "slot_map",
          [](const ExpertPool& p) { return copied(std::span<const std::int32_t>(p.slot_map())); })
      .def_property_readonly(
          "scores", [](const ExpertPool& p) { return copied(std::span<const double>(p.scores())); })
      .def_property_readonly("stats", &ExpertPool::stats)
      .def("reset_stats", &ExpertPool::reset_stats)
      .def_property_readonly("usage", &ExpertPool::usage)
      .def("__repr__", [](const ExpertPool& p) {
        return "moesaic.ExpertPool(num_experts=" + std::to_string(p.num_experts()) +
               ", budget=" + std::to_string(p.budget()) + ", " + text_of(p.config().refresh) +
               ", " + name_of(p.config().ranking) + ")";
      });
}

}  // namespace moesaic::python
