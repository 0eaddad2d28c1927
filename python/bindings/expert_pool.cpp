#include "moesaic/expert_pool.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "offload.hpp"

namespace moesaic::python {
namespace {

using Pool = std::shared_ptr<ExpertPool>;

/// A new numpy array with a copy of the values, of the shape given (or flat).
template <class T>
py::array_t<T> copied(std::span<const T> values, std::vector<py::ssize_t> shape = {}) {
  if (shape.empty()) shape.push_back(static_cast<py::ssize_t>(values.size()));
  py::array_t<T> out(shape);
  std::ranges::copy(values, out.mutable_data());
  return out;
}

py::list load_tuples(const std::vector<SlotLoad>& loads) {
  py::list list;
  for (const SlotLoad& load : loads) {
    list.append(py::make_tuple(load.expert, load.slot, load.evicted));
  }
  return list;
}

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

std::string policy_text(const RefreshPolicy& policy) {
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

void bind_policy(py::module_& m) {
  py::class_<RefreshPolicy>(
      m, "RefreshPolicy", py::is_final(),
      "When an ExpertPool asks to be refreshed; every_denoise_steps(1) unless said.")
      .def_static("every_forward", &RefreshPolicy::every_forward, "At every forward.")
      .def_static("every_decode_steps", &RefreshPolicy::every_decode_steps, py::arg("n"),
                  "When the decode step is a multiple of n.")
      .def_static("every_denoise_steps", &RefreshPolicy::every_denoise_steps, py::arg("n"),
                  "When the denoise step is a multiple of n.")
      .def_static("manual", &RefreshPolicy::manual, "Only at a prefill block or when forced.")
      .def_readonly("steps", &RefreshPolicy::steps, "n of the step policies.")
      .def(
          "__eq__",
          [](const RefreshPolicy& a, const py::object& b) {
            return py::isinstance<RefreshPolicy>(b) && a == b.cast<const RefreshPolicy&>();
          },
          py::arg("other"))
      .def("__repr__",
           [](const RefreshPolicy& p) { return "moesaic.RefreshPolicy." + policy_text(p); });

  py::class_<RefreshResult>(m, "RefreshResult", py::is_final(),
                            "What a refresh decided. True when the pool was due.")
      .def_readonly("refreshed", &RefreshResult::refreshed, "Whether the pool was due.")
      .def_readonly("target", &RefreshResult::target,
                    "Wanted experts, best first; may be shorter than the budget.")
      .def_property_readonly(
          "promotions",
          [](const RefreshResult& r) {
            std::vector<std::int32_t> experts;
            for (const SlotLoad& load : r.promotions) experts.push_back(load.expert);
            return experts;
          },
          "Experts that come, in target order.")
      .def_readonly("demotions", &RefreshResult::demotions,
                    "Experts that leave, each for the promotion at the same place.")
      .def_property_readonly(
          "loads", [](const RefreshResult& r) { return load_tuples(r.promotions); },
          "(expert, slot, evicted expert) of each promotion.")
      .def_readonly("bytes", &RefreshResult::bytes,
                    "That the promotions will move; 0 from a pool without a store.")
      .def("__bool__", [](const RefreshResult& r) { return r.refreshed; })
      .def("__repr__", [](const RefreshResult& r) {
        return "moesaic.RefreshResult(promotions=" + std::to_string(r.promotions.size()) +
               ", demotions=" + std::to_string(r.demotions.size()) +
               ", bytes=" + std::to_string(r.bytes) + ")";
      });
}

void bind_counts(py::module_& m) {
  py::class_<PoolStats>(m, "PoolStats", py::is_final(),
                        "Cumulative; a forward counts once, not once per role.")
      .def_readonly("forwards", &PoolStats::forwards, "Forwards of the layer.")
      .def_readonly("refreshes", &PoolStats::refreshes, "Placements that were decided.")
      .def_readonly("promotions", &PoolStats::promotions, "Experts that got a slot.")
      .def_readonly("demotions", &PoolStats::demotions, "Experts that lost theirs.")
      .def_readonly("hit_experts", &PoolStats::hit_experts,
                    "Distinct experts of each forward that were resident.")
      .def_readonly("miss_experts", &PoolStats::miss_experts, "Those that were not.")
      .def_readonly("hit_pairs", &PoolStats::hit_pairs, "Token-expert pairs on residents.")
      .def_readonly("miss_pairs", &PoolStats::miss_pairs, "The others.")
      .def_readonly("staged", &PoolStats::staged, "Missing experts that were given a slot.")
      .def_readonly("streamed", &PoolStats::streamed,
                    "Missing experts that only passed through fast memory.")
      .def_readonly("bytes", &PoolStats::bytes, "Moved into fast memory.")
      .def_property_readonly("hit_rate", &PoolStats::hit_rate,
                             "hit_pairs of all pairs; 1 before the first.")
      .def("__repr__", [](const PoolStats& s) {
        return "moesaic.PoolStats(forwards=" + std::to_string(s.forwards) +
               ", hit_rate=" + std::to_string(s.hit_rate()) + ", bytes=" + std::to_string(s.bytes) +
               ")";
      });

  py::class_<ExpertUsage>(m, "ExpertUsage", py::is_final(),
                          "How often each expert of a layer was used; a copy.")
      .def_property_readonly("forwards", &ExpertUsage::forwards, "Forwards counted.")
      .def_property_readonly("tokens", &ExpertUsage::tokens, "Tokens counted.")
      .def_property_readonly(
          "counts", [](const ExpertUsage& u) { return copied(u.counts()); },
          "int64 [E], token-expert pairs.")
      .def_property_readonly("interval", &ExpertUsage::interval,
                             "Forwards per row of history; doubles as a long run goes on.")
      .def_property_readonly(
          "history",
          [](const ExpertUsage& u) {
            const auto rows = static_cast<py::ssize_t>(u.history().size()) / u.num_experts();
            return copied(u.history(), {rows, u.num_experts()});
          },
          "int64 [rows, E], counts over time.")
      .def_property_readonly(
          "coactivation",
          [](const ExpertUsage& u) -> py::object {
            if (u.coactivation().empty()) return py::none();
            return copied(u.coactivation(), {u.num_experts(), u.num_experts()});
          },
          "int64 [E, E], tokens that used both; None unless the pool was asked to count them.")
      .def("__repr__", [](const ExpertUsage& u) {
        return "moesaic.ExpertUsage(forwards=" + std::to_string(u.forwards()) +
               ", tokens=" + std::to_string(u.tokens()) + ")";
      });
}

}  // namespace

void bind_expert_pool(py::module_& m) {
  bind_policy(m);
  bind_counts(m);
  py::class_<ExpertPool, Pool>(
      m, "ExpertPool", py::is_final(),
      "Which experts of a layer have a slot in fast memory: bookkeeping, no weights.\n"
      "The number of residents is the budget at all times; equal inputs give equal\n"
      "placements. Thread safe.\n\n"
      ">>> import moesaic as mo\n"
      ">>> pool = mo.ExpertPool(8, 4)\n"
      ">>> pool.refresh_from_indices([5, 6, 5, 0]).target\n"
      "[5, 0, 6]\n"
      ">>> pool.residents.tolist()\n"
      "[0, 1, 5, 6]")
      .def(py::init(&make_pool), py::arg("num_experts"), py::arg("budget"),
           py::arg("refresh") = py::none(), py::kw_only(), py::arg("ranking") = "hits",
           py::arg("decay") = 0.0, py::arg("margin") = 0.0, py::arg("min_dwell") = 0,
           py::arg("admit") = true, py::arg("coactivation") = false,
           "Experts 0..budget-1 start resident. ranking: 'hits' (score = decay * score + hits,\n"
           "once per observed forward; decay 0 counts only the last), 'recency' (last use) or\n"
           "'fixed' (nobody moves). A challenger must exceed an incumbent's score by the\n"
           "fraction margin; a newcomer stays for min_dwell observed forwards. admit: whether\n"
           "staging gives slots to missing experts, or only refreshes do. coactivation: usage\n"
           "also counts pairs of experts.\n\n"
           "Raises ConfigError.")
      .def_static(
          "all_resident",
          [](std::int32_t num_experts) {
            return std::make_shared<ExpertPool>(ExpertPool::all_resident(num_experts));
          },
          py::arg("num_experts"), "A pool whose budget is everything.")
      .def_property_readonly("num_experts", &ExpertPool::num_experts, "E.")
      .def_property_readonly("budget", &ExpertPool::budget, "Experts in fast memory.")
      .def_property_readonly("offload_enabled", &ExpertPool::offload_enabled,
                             "Whether the budget is below E.")
      .def_property_readonly(
          "refresh_policy", [](const ExpertPool& p) { return p.config().refresh; },
          "RefreshPolicy.")
      .def_property_readonly(
          "ranking", [](const ExpertPool& p) { return name_of(p.config().ranking); },
          "hits | recency | fixed.")
      .def(
          "should_refresh",
          [](const ExpertPool& p, std::int64_t step, bool prefill, const std::string& mode) {
            return p.should_refresh(step, prefill, parse_mode(mode, "ExpertPool.should_refresh"));
          },
          py::arg("step"), py::arg("is_prefill_block") = false, py::arg("mode") = "reuse",
          "False without offload; True at a prefill block or with mode 'refresh'; else by the\n"
          "policy.")
      .def(
          "observe",
          [](ExpertPool& p, const py::object& ids) {
            with_ids(ids, "ExpertPool.observe", [&](auto experts) { p.observe(experts); });
          },
          py::arg("ids"),
          "Count one forward's ids (any shape, -1 skipped) into the scores. Raises ShapeError.")
      .def("refresh", &ExpertPool::refresh,
           "Place the best experts; returns a RefreshResult. Nothing moves before\n"
           "MoeExpertStore.apply.")
      .def(
          "refresh_from_indices",
          [](ExpertPool& p, const py::object& ids) {
            return with_ids(ids, "ExpertPool.refresh_from_indices",
                            [&](auto experts) { return p.refresh_from_indices(experts); });
          },
          py::arg("ids"), "observe(ids), then refresh().")
      .def(
          "apply_target",
          [](ExpertPool& p, const py::object& target) {
            return with_ids(target, "ExpertPool.apply_target",
                            [&](auto experts) { return p.apply_target(experts); });
          },
          py::arg("target"), "Place these experts, at most budget of them. Raises ShapeError.")
      .def(
          "stage",
          [](ExpertPool& p, const py::object& ids) {
            return with_ids(ids, "ExpertPool.stage",
                            [&](auto experts) { return load_tuples(p.stage(experts)); });
          },
          py::arg("ids"),
          "observe(ids) and give missing ones slots where they rank above an expert that these\n"
          "ids do not need; returns (expert, slot, evicted). A layer with on_miss='stage' calls\n"
          "it for each forward.")
      .def(
          "warm", [](ExpertPool& p, const std::vector<double>& scores) { return p.warm(scores); },
          py::arg("scores"), "Set the scores [E] and place by them. Raises ShapeError.")
      .def("target", &ExpertPool::target, "The best experts by score, without zeroes.")
      .def_property_readonly(
          "residents",
          [](const ExpertPool& p) { return copied(std::span<const std::int32_t>(p.residents())); },
          "int32, ascending.")
      .def_property_readonly(
          "resident_mask",
          [](const ExpertPool& p) {
            return copied(std::span<const std::uint8_t>(p.resident_mask())).attr("astype")("bool");
          },
          "bool [E].")
      .def_property_readonly(
          "slot_map",
          [](const ExpertPool& p) { return copied(std::span<const std::int32_t>(p.slot_map())); },
          "int32 [E], -1 = not resident: as decided. MoeExpertStore.slot_map tells what is loaded.")
      .def_property_readonly(
          "scores", [](const ExpertPool& p) { return copied(std::span<const double>(p.scores())); },
          "float64 [E].")
      .def_property_readonly("stats", &ExpertPool::stats, "PoolStats, a copy.")
      .def("reset_stats", &ExpertPool::reset_stats, "Zero the stats.")
      .def_property_readonly("usage", &ExpertPool::usage,
                             "ExpertUsage of the forwards that ran, a copy.")
      .def("__repr__", [](const ExpertPool& p) {
        return "moesaic.ExpertPool(num_experts=" + std::to_string(p.num_experts()) +
               ", budget=" + std::to_string(p.budget()) + ", " + policy_text(p.config().refresh) +
               ", " + name_of(p.config().ranking) + ")";
      });

  m.def(
      "target_from_counts",
      [](const std::vector<std::int64_t>& counts, std::int32_t budget) {
        return target_from_counts(counts, budget);
      },
      py::arg("counts"), py::arg("budget"),
      "The experts with the most hits, descending, ties to the lower id, zeroes left out.");
  m.def("budget_from_memory", &budget_from_memory, py::arg("free"), py::arg("reserve"),
        py::arg("expert_bytes"), py::arg("layers"), py::arg("num_experts"),
        "Experts per layer that fit into free - reserve bytes, at most num_experts; all of them\n"
        "when expert_bytes or layers is 0. expert_bytes: one expert's gate, up and down.\n"
        "Raises ConfigError on a negative argument.");
  m.def(
      "merged_resident_mask",
      [](const std::vector<Pool>& pools) {
        std::vector<const ExpertPool*> pointers;
        for (const Pool& pool : pools) pointers.push_back(pool.get());
        return copied(std::span<const std::uint8_t>(merged_resident_mask(pointers)))
            .attr("astype")("bool");
      },
      py::arg("pools"),
      "bool [E]: experts resident in any of the pools. Raises ShapeError on unequal sizes.");
}

}  // namespace moesaic::python
