#include "moesaic/plan.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calls.hpp"
#include "fields.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "routing.hpp"

namespace moesaic::python {
namespace {

template <class Owner>
py::array view_of(std::span<const std::int32_t> values, const std::shared_ptr<Owner>& owner) {
  return numpy_view(DType::I32, {static_cast<std::int64_t>(values.size())}, values.data(), owner);
}

PlanObject build(const RoutingObject& routing, std::int32_t num_experts) {
  const auto held = host_routing(routing, "BucketPlan.build");
  const InterruptibleRelease release;
  return {std::make_shared<BucketPlan>(BucketPlan::build(*held, num_experts))};
}

void rebuild(PlanObject& plan, const RoutingObject& routing) {
  const auto held = host_routing(routing, "BucketPlan.rebuild");
  // A call on another thread or an array may use the old plan. And a long call gives the GIL away,
  // so that others may look at the plan meanwhile.
  constexpr std::int64_t kLong = std::int64_t{1} << 20;
  if (plan.value.use_count() > 1 || held->view().num_pairs() > kLong) {
    plan = build(routing, plan.value->num_experts());
    return;
  }
  plan.value->rebuild(*held);
}

std::vector<std::int32_t> numbers(const py::dict& values, const char* name) {
  return py::array_t<std::int32_t>(values[name]).cast<std::vector<std::int32_t>>();
}

/// What keeps an object alive that Python holds.
std::shared_ptr<AlignedRouting> held(const AlignedRouting& aligned) {
  return py::cast(&aligned).cast<std::shared_ptr<AlignedRouting>>();
}

/// A routing of pairs that all stand alone: what a plan knows of the one that it was built from.
class PairExperts {
 public:
  PairExperts(std::int64_t num_tokens, std::int32_t top_k) : routing_(num_tokens, top_k) {
    std::ranges::fill(routing_.topk_ids(), -1);
  }
  /// Throws ShapeError unless there is such a pair.
  void set(std::int64_t pair, std::int32_t expert) {
    const auto ids = routing_.topk_ids();
    require<ShapeError>(pair >= 0 && pair < static_cast<std::int64_t>(ids.size()), [&] {
      return Problem{
          "plan", "pair", "one of " + std::to_string(ids.size()), std::to_string(pair), {}};
    });
    ids[static_cast<std::size_t>(pair)] = expert;
  }
  const Routing& routing() const { return routing_; }

 private:
  Routing routing_;
};

/// The plan of its fields, built again from the experts of its pairs, so that it is sorted.
py::object plan_of(const py::dict& values) {
  check_fields(values, "BucketPlan",
               {"expert_offsets", "row_pair", "num_tokens", "top_k", "num_experts"});
  const auto offsets = numbers(values, "expert_offsets"), row_pair = numbers(values, "row_pair");
  PairExperts experts(values["num_tokens"].cast<std::int64_t>(),
                      values["top_k"].cast<std::int32_t>());
  for (std::size_t e = 0; e + 1 < offsets.size(); ++e) {
    for (std::int32_t row = offsets[e]; row < offsets[e + 1]; ++row) {
      experts.set(row_pair.at(static_cast<std::size_t>(row)), static_cast<std::int32_t>(e));
    }
  }
  return py::cast(PlanObject{std::make_shared<BucketPlan>(
      BucketPlan::build(experts.routing(), values["num_experts"].cast<std::int32_t>()))});
}

/// The aligned routing of its fields. Rows that are packed do not say which pairs they were, and
/// the result depends on their number alone.
py::object aligned_of(const py::dict& values) {
  check_fields(
      values, "AlignedRouting",
      {"num_pairs", "block_size", "sorted_ids", "block_experts", "row_space", "num_experts"});
  const auto num_pairs = values["num_pairs"].cast<std::int32_t>();
  const auto block_size = values["block_size"].cast<std::int32_t>();
  const auto ids = numbers(values, "sorted_ids"), blocks = numbers(values, "block_experts");
  PairExperts experts(num_pairs, 1);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] == num_pairs) continue;  // padding
    experts.set(ids[i], blocks.at(i / static_cast<std::size_t>(std::max(block_size, 1))));
  }
  const auto row_space =
      FieldCast<RowSpace>::from(values["row_space"], "AlignedRouting", "row_space");
  return py::cast(std::make_shared<AlignedRouting>(AlignedRouting::build(
      experts.routing(), values["num_experts"].cast<std::int32_t>(), block_size, row_space)));
}

std::int32_t pick(const PlanObject* plan, bool device_route,
                  std::optional<std::int64_t> total_pairs, const Tuning* tuning) {
  require<ShapeError>(total_pairs.value_or(0) >= 0, [&] {
    return Problem{
        "pick_block_size", "total_pairs", "at least 0", std::to_string(*total_pairs), {}};
  });
  std::span<const std::int32_t> offsets;
  if (plan != nullptr) offsets = plan->value->expert_offsets();
  const std::int64_t pairs =
      total_pairs ? *total_pairs : (plan != nullptr ? plan->value->num_rows() : 0);
  return pick_block_size(offsets, device_route, pairs,
                         tuning != nullptr ? *tuning : current_tuning());
}

}  // namespace

void bind_plan(py::module_& m) {
  py::class_<PlanObject> plan(m, "BucketPlan", py::is_final());
  plan.def_static("build", &build, py::arg("routing"), py::arg("num_experts"))
      .def(
          "rebuild",
          [](const py::object& self, const RoutingObject& routing) {
            rebuild(self.cast<PlanObject&>(), routing);
            return self;
          },
          py::arg("routing"))
      .def_property_readonly("num_pairs", [](const PlanObject& p) { return p.value->num_pairs(); })
      .def_property_readonly("num_rows", [](const PlanObject& p) { return p.value->num_rows(); })
      .def("__repr__", [](const PlanObject& p) {
        return "moesaic.BucketPlan(num_experts=" + std::to_string(p.value->num_experts()) +
               ", num_tokens=" + std::to_string(p.value->num_tokens()) +
               ", num_rows=" + std::to_string(p.value->num_rows()) + ")";
      });
  using Plan = PlanObject;
  define_value(
      plan,
      Fields<Plan>("BucketPlan")
          .view("num_experts", [](const Plan& p) { return py::int_(p.value->num_experts()); })
          .view("num_tokens", [](const Plan& p) { return py::int_(p.value->num_tokens()); })
          .view("top_k", [](const Plan& p) { return py::int_(p.value->top_k()); })
          .view("expert_offsets",
                [](const Plan& p) { return view_of(p.value->expert_offsets(), p.value); })
          .view("row_token", [](const Plan& p) { return view_of(p.value->row_token(), p.value); })
          .view("row_pair", [](const Plan& p) { return view_of(p.value->row_pair(), p.value); })
          .view("pair_row", [](const Plan& p) { return view_of(p.value->pair_row(), p.value); }),
      {.hash = false, .make = &plan_of});

  using Aligned = AlignedRouting;
  py::class_<Aligned, std::shared_ptr<Aligned>> aligned(m, "AlignedRouting", py::is_final());
  aligned.def_property_readonly("num_blocks", &Aligned::num_blocks)
      .def_property_readonly("num_post_pad", &Aligned::num_post_pad)
      .def("__repr__", [](const AlignedRouting& a) {
        return "moesaic.AlignedRouting(block_size=" + std::to_string(a.block_size()) +
               ", num_blocks=" + std::to_string(a.num_blocks()) + ")";
      });
  define_value(
      aligned,
      Fields<Aligned>("AlignedRouting")
          .view("block_size", [](const Aligned& a) { return py::int_(a.block_size()); })
          .view("num_experts", [](const Aligned& a) { return py::int_(a.num_experts()); })
          .view("num_pairs", [](const Aligned& a) { return py::int_(a.num_pairs()); })
          .view("row_space", [](const Aligned& a) { return py::str(name_of(a.row_space())); })
          .view("sorted_ids", [](const Aligned& a) { return view_of(a.sorted_ids(), held(a)); })
          .view("block_experts",
                [](const Aligned& a) { return view_of(a.block_experts(), held(a)); }),
      {.make = &aligned_of});

  m.def(
      "align_block_size",
      [](const RoutingObject& routing, std::int32_t num_experts, std::int32_t block_size,
         const std::string& row_space) {
        const auto space = parse_name<RowSpace>(row_space, "align_block_size", "row_space");
        const auto held = host_routing(routing, "align_block_size");
        const InterruptibleRelease release;
        return std::make_shared<AlignedRouting>(
            AlignedRouting::build(*held, num_experts, block_size, space));
      },
      py::arg("routing"), py::arg("num_experts"), py::arg("block_size"),
      py::arg("row_space") = "token_pairs");
  m.def("pick_block_size", &pick, py::arg("plan"), py::kw_only(), py::arg("device_route") = false,
        py::arg("total_pairs") = py::none(), py::arg("tuning") = py::none());
}

}  // namespace moesaic::python
