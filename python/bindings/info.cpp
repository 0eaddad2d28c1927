/// What this build and machine can do.

#include <pybind11/stl.h>

#include "bindings.hpp"
#include "calls.hpp"
#include "fields.hpp"
#include "layer.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/quant_matrix.hpp"

namespace moesaic::python {
namespace {

struct BackendObject {
  BackendInfo info;
  std::vector<KernelInfo> kernels;
};

std::vector<BackendObject> list_backends() {
  std::vector<BackendObject> all;
  for (const auto& backend : backends()) all.push_back({backend->info(), backend->kernels()});
  return all;
}

py::dict facts_of(const Explanation& explanation) {
  py::dict facts;
  for (const auto& [name, value] : explanation.facts) facts[py::str(name)] = value;
  return facts;
}

py::dict explain_layer(const LayerObject& object, std::int64_t num_tokens) {
  const auto layer = object.get("explain");
  const Call call(object.precision(), layer->stack().device());
  return facts_of(explain(call.context, LayerRef(*layer), layer->config().top_k, num_tokens));
}

py::dict explain_matrix(const std::shared_ptr<QuantMatrix>& matrix, std::int64_t num_rows) {
  const Call call({}, matrix->device());
  return facts_of(explain(call.context, *matrix, num_rows));
}

py::dict build_info() {
  py::dict info;
  info["version"] = MOESAIC_VERSION;
  info["compiler"] = MOESAIC_COMPILER;
  info["build_type"] = MOESAIC_BUILD_TYPE;
  info["threads"] = std::to_string(default_threads());
  const Topology& topology = machine_topology(current_tuning().numa.count);
  info["numa"] = topology.text() + ": " + topology.reason;
  return info;
}

}  // namespace

void bind_info(py::module_& m) {
  py::class_<KernelInfo> kernel(m, "KernelInfo", py::is_final());
  kernel.def("__repr__", [](const KernelInfo& k) { return "moesaic.KernelInfo(" + k.name + ")"; });
  define_value(kernel, Fields<KernelInfo>("KernelInfo")
                           .add("operation", &KernelInfo::operation)
                           .add("type", &KernelInfo::type)
                           .add("layout", &KernelInfo::layout)
                           .add("isa", &KernelInfo::isa)
                           .add("name", &KernelInfo::name));
  py::class_<BackendObject> backend(m, "BackendInfo", py::is_final());
  backend.def("__repr__", [](const BackendObject& b) {
    return "moesaic.BackendInfo(" + b.info.name + ", " +
           (b.info.available ? b.info.detail : "absent: " + b.info.reason) + ")";
  });
  define_value(backend, Fields<BackendObject>("BackendInfo")
                            .add("name", [](auto& b) -> auto& { return b.info.name; })
                            .add("available", [](auto& b) -> auto& { return b.info.available; })
                            .add("reason", [](auto& b) -> auto& { return b.info.reason; })
                            .add("devices", [](auto& b) -> auto& { return b.info.devices; })
                            .add("detail", [](auto& b) -> auto& { return b.info.detail; })
                            .add("kernels", &BackendObject::kernels));

  m.def("backends", &list_backends);
  m.def("explain", &explain_layer, py::arg("layer"), py::arg("num_tokens") = 8);
  m.def("explain_matrix", &explain_matrix, py::arg("matrix").none(false), py::arg("num_rows") = 8);
  m.attr("version") = MOESAIC_VERSION;
  m.def("build_info", &build_info);
}

}  // namespace moesaic::python
