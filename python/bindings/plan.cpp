#include "moesaic/plan.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calls.hpp"
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
  py::class_<PlanObject>(m, "BucketPlan", py::is_final())
      .def_static("build", &build, py::arg("routing"), py::arg("num_experts"))
      .def(
          "rebuild",
          [](const py::object& self, const RoutingObject& routing) {
            rebuild(self.cast<PlanObject&>(), routing);
            return self;
          },
          py::arg("routing"))
      .def_property_readonly("num_experts",
                             [](const PlanObject& p) { return p.value->num_experts(); })
      .def_property_readonly("num_tokens",
                             [](const PlanObject& p) { return p.value->num_tokens(); })
      .def_property_readonly("top_k", [](const PlanObject& p) { return p.value->top_k(); })
      .def_property_readonly("num_pairs", [](const PlanObject& p) { return p.value->num_pairs(); })
      .def_property_readonly("num_rows", [](const PlanObject& p) { return p.value->num_rows(); })
      .def_property_readonly(
          "expert_offsets",
          [](const PlanObject& p) { return view_of(p.value->expert_offsets(), p.value); })
      .def_property_readonly(
          "row_token", [](const PlanObject& p) { return view_of(p.value->row_token(), p.value); })
      .def_property_readonly(
          "row_pair", [](const PlanObject& p) { return view_of(p.value->row_pair(), p.value); })
      .def_property_readonly(
          "pair_row", [](const PlanObject& p) { return view_of(p.value->pair_row(), p.value); })
      .def("__repr__", [](const PlanObject& p) {
        return "moesaic.BucketPlan(num_experts=" + std::to_string(p.value->num_experts()) +
               ", num_tokens=" + std::to_string(p.value->num_tokens()) +
               ", num_rows=" + std::to_string(p.value->num_rows()) + ")";
      });

  using Aligned = std::shared_ptr<AlignedRouting>;
  py::class_<AlignedRouting, Aligned>(m, "AlignedRouting", py::is_final())
      .def_property_readonly("block_size", &AlignedRouting::block_size)
      .def_property_readonly("num_experts", &AlignedRouting::num_experts)
      .def_property_readonly("num_pairs", &AlignedRouting::num_pairs)
      .def_property_readonly("num_blocks", &AlignedRouting::num_blocks)
      .def_property_readonly("row_space",
                             [](const AlignedRouting& a) { return name_of(a.row_space()); })
      .def_property_readonly("num_post_pad", &AlignedRouting::num_post_pad)
      .def_property_readonly("sorted_ids",
                             [](const Aligned& a) { return view_of(a->sorted_ids(), a); })
      .def_property_readonly("block_experts",
                             [](const Aligned& a) { return view_of(a->block_experts(), a); })
      .def("__repr__", [](const AlignedRouting& a) {
        return "moesaic.AlignedRouting(block_size=" + std::to_string(a.block_size()) +
               ", num_blocks=" + std::to_string(a.num_blocks()) + ")";
      });

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
