#include "routing.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "arrays.hpp"
#include "calls.hpp"
#include "config.hpp"
#include "fields.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"
#include "values.hpp"

namespace moesaic::python {

Routing& RoutingObject::resized(std::int64_t num_tokens, std::int32_t top_k) {
  if (value.use_count() > 1) value = std::make_shared<Routing>();
  value->resize(num_tokens, top_k);
  return *value;
}

RoutingFill::RoutingFill(RoutingObject& object, std::int64_t num_tokens, std::int32_t top_k)
    : object_(object) {
  // Never destroyed, as the module is not.
  static const auto* const empty = new std::shared_ptr<Routing>(std::make_shared<Routing>(0, 1));
  object.resized(num_tokens, top_k);
  target_ = std::exchange(object.value, *empty);
}

std::shared_ptr<Routing> host_routing(const RoutingObject& routing, const char* operation) {
  require<DeviceError>(routing.device == nullptr, [&] {
    return Problem{operation, "routing", "one in cpu memory", to_string(routing.device->where),
                   "copy its arrays to the cpu first"};
  });
  return routing.value;
}

namespace {

RoutingObject make_routing(const py::object& topk_ids, const py::object& topk_weights,
                           std::int32_t skipped) {
  constexpr const char* kOperation = "Routing";
  if (auto device = device_routing(topk_ids, topk_weights)) {
    require<UnsupportedError>(skipped == -1, [&] {
      return Problem{kOperation, "skipped", "-1 for ids on a GPU", std::to_string(skipped),
                     "an id out of range counts as -1 there"};
    });
    RoutingObject routing;
    routing.device = std::move(device);
    return routing;
  }
  const Ids ids = import_ids(topk_ids, kOperation, "topk_ids");
  const ArrayRef weights = import_f32(topk_weights, kOperation, "topk_weights");
  require<ShapeError>(
      ids.view.rank == 2 && ids.view.dim(1) <= std::numeric_limits<std::int32_t>::max(),
      [&] { return Problem{kOperation, "topk_ids", "[T, top_k]", describe(ids.view), {}}; });
  require<ShapeError>(weights.view.rank == 2 && weights.view.dim(0) == ids.view.dim(0) &&
                          weights.view.dim(1) == ids.view.dim(1),
                      [&] {
                        return Problem{kOperation,
                                       "topk_weights",
                                       "the shape of topk_ids, " + describe(ids.view),
                                       describe(weights.view),
                                       {}};
                      });
  require<DTypeError>(weights.view.dtype == DType::F32, [&] {
    return Problem{kOperation, "topk_weights", "f32, f16 or bf16", name_of(weights.view.dtype), {}};
  });
  RoutingObject routing;
  routing.maker = ArrayMaker::like(topk_ids);
  Routing& value = routing.resized(ids.view.dim(0), static_cast<std::int32_t>(ids.view.dim(1)));
  if (!ids.view.empty())
    std::memcpy(value.topk_ids().data(), ids.view.data, value.topk_ids().size_bytes());
  std::ranges::replace(value.topk_ids(), skipped, -1);
  auto to = value.topk_weights().begin();
  const auto* from = static_cast<const float*>(weights.view.data);
  for (std::int64_t t = 0; t < weights.view.dim(0); ++t) {
    for (std::int64_t k = 0; k < weights.view.dim(1); ++k)
      *to++ = from[t * weights.view.stride(0) + k * weights.view.stride(1)];
  }
  return routing;
}

/// One array [T, top_k] of a routing in host memory, of the package that the routing was made for.
py::object routing_array(const RoutingObject& routing, DType dtype, const void* data) {
  const std::vector<std::int64_t> shape{routing.num_tokens(), routing.top_k()};
  if (routing.maker.kind() == ArrayKind::Numpy)
    return numpy_view(dtype, shape, data, routing.value);
  if (routing.maker.kind() == ArrayKind::Own) {
    const auto view = std::make_shared<Array>();
    view->view = dense_view(const_cast<void*>(data), dtype, shape);
    view->read_only = true;
    view->owner = routing.value;
    return routing.maker(view);
  }
  // Packages that know no read-only arrays would write to the routing itself.
  const auto copy = new_array(dtype, shape);
  const std::int64_t bytes = dense_bytes(dtype, shape, "Routing");
  if (bytes > 0) std::memcpy(copy->view.data, data, static_cast<std::size_t>(bytes));
  return routing.maker(copy);
}

/// A list as an array [T, top_k] of this type; arrays stay.
py::object rows_of(const py::object& value, const py::dtype& dtype, std::int64_t top_k) {
  if (!py::isinstance<py::list>(value)) return value;
  const py::object rows =
      call_python(py::module_::import("numpy").attr("array"), py::make_tuple(value, dtype));
  return rows.attr("reshape")(-1, top_k);
}

/// The routing of its fields.
py::object routing_of(const py::dict& values) {
  check_fields(values, "Routing.from_dict", {"top_k", "topk_ids", "topk_weights"});
  const auto top_k = values["top_k"].cast<std::int64_t>();
  return py::cast(make_routing(rows_of(values["topk_ids"], py::dtype::of<std::int32_t>(), top_k),
                               rows_of(values["topk_weights"], py::dtype::of<float>(), top_k), -1));
}

/// The ids that a router with select_on "given" weighs.
void fill_given(const py::object& topk_ids, const RouterConfig& config, Routing& target) {
  const bool given = config.select_on == SelectOn::Given;
  require<ConfigError>(given != topk_ids.is_none(), [&] {
    return Problem{"route", "topk_ids", given ? "the ids to weigh" : "none: this router selects",
                   given ? "none" : "some", given ? "" : "router.replace(select_on='given')"};
  });
  if (!given) return;
  Ids ids = import_ids(topk_ids, "route", "topk_ids");
  ids.merge_first(ids.view.rank - 1);
  require<ShapeError>(ids.view.rank == 2 && ids.view.dim(0) == target.num_tokens() &&
                          ids.view.dim(1) == target.top_k(),
                      [&] {
                        return Problem{"route",
                                       "topk_ids",
                                       "[" + std::to_string(target.num_tokens()) + ", " +
                                           std::to_string(target.top_k()) + "]",
                                       describe(ids.view),
                                       {}};
                      });
  if (!ids.view.empty())
    std::memcpy(target.topk_ids().data(), ids.view.data, target.topk_ids().size_bytes());
}

py::object route_logits(const py::object& logits, const std::optional<RouterConfig>& router,
                        std::optional<std::int32_t> top_k, std::optional<bool> renormalize,
                        const py::object& topk_ids, const py::object& out) {
  const TokenRows tokens = import_f32_tokens(logits, "route", "logits", {}, RowLayout::Dense);
  const TensorView& in = tokens.rows;
  require<ShapeError>(in.rank == 2,
                      [&] { return Problem{"route", "logits", "[T, E]", describe(in), {}}; });
  const RouterConfig config =
      call_router(router, top_k, renormalize, static_cast<std::int32_t>(in.dim(1)), "route");
  require<DTypeError>(out.is_none() || py::isinstance<RoutingObject>(out), [&] {
    return Problem{"route", "out", "a Routing to reuse, or None", type_name(out), {}};
  });
  py::object result = out.is_none() ? py::cast(RoutingObject{}) : out;
  auto& object = result.cast<RoutingObject&>();
  host_routing(object, "route");
  object.maker = ArrayMaker::like(logits);
  const RoutingFill fill(object, in.dim(0), config.top_k);
  Routing& target = fill.target();
  fill_given(topk_ids, config, target);
  const bool strict = current_tuning().strict;
  const auto profiler = current_profiler();
  RouteStats stats;
  {
    const InterruptibleRelease release;
    const ScopedZone zone(profiler.get(), Zone::Route);
    stats = route(in, config, target);
  }
  if (profiler) profiler->add(Counter::NonfiniteRows, stats.nonfinite_rows);
  require<ConfigError>(!strict || stats.nonfinite_rows == 0, [&] {
    return Problem{"route",
                   "logits",
                   "finite rows under strict",
                   std::to_string(stats.nonfinite_rows) + " rows with NaN or infinity",
                   {}};
  });
  return result;
}

}  // namespace

void bind_routing(py::module_& m) {
  py::class_<RoutingObject> type(m, "Routing", py::is_final());
  type.def(py::init(&make_routing), py::arg("topk_ids"), py::arg("topk_weights"), py::kw_only(),
           py::arg("skipped") = -1)
      .def_property_readonly("num_tokens", [](const RoutingObject& r) { return r.num_tokens(); })
      .def("__repr__", [](const RoutingObject& r) {
        return "moesaic.Routing(num_tokens=" + std::to_string(r.num_tokens()) +
               ", top_k=" + std::to_string(r.top_k()) +
               (r.device ? ", " + to_string(r.device->where) : "") + ")";
      });
  // A routing is its values, whatever package's arrays it shows; those are what the properties give.
  const auto value_of = [](DType dtype, const void* (*data)(const Routing&)) {
    return [=](const RoutingObject& r) -> py::object {
      if (r.device) return dtype == DType::I32 ? r.device->topk_ids : r.device->topk_weights;
      return numpy_view(dtype, {r.num_tokens(), r.top_k()}, data(*r.value), r.value);
    };
  };
  const auto ids = [](const Routing& r) -> const void* { return r.topk_ids().data(); };
  const auto weights = [](const Routing& r) -> const void* { return r.topk_weights().data(); };
  define_value(type,
               Fields<RoutingObject>("Routing")
                   .view("top_k", [](const RoutingObject& r) { return py::int_(r.top_k()); })
                   .view("topk_ids", value_of(DType::I32, ids))
                   .view("topk_weights", value_of(DType::F32, weights)),
               {.hash = false, .from_dict = true, .make = &routing_of});
  type.def_property_readonly("topk_ids",
                             [](const RoutingObject& r) -> py::object {
                               if (r.device) return r.device->topk_ids;
                               return routing_array(r, DType::I32, r.value->topk_ids().data());
                             })
      .def_property_readonly("topk_weights", [](const RoutingObject& r) -> py::object {
        if (r.device) return r.device->topk_weights;
        return routing_array(r, DType::F32, r.value->topk_weights().data());
      });

  m.def("route", &route_logits, py::arg("logits"), py::arg("router") = py::none(), py::kw_only(),
        py::arg("top_k") = py::none(), py::arg("renormalize") = py::none(),
        py::arg("topk_ids") = py::none(), py::arg("out") = py::none());
}

}  // namespace moesaic::python
