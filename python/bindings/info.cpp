/// What this build and machine can do.

#include <pybind11/stl.h>

#include "bindings.hpp"
#include "calls.hpp"
#include "layer.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/forward.hpp"

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

py::dict explain_layer(const LayerObject& object, std::int64_t num_tokens) {
  const auto layer = object.get("explain");
  const Call call(object.precision(), layer->stack().device());
  py::dict facts;
  for (const auto& [name, value] :
       explain(call.context, LayerRef(*layer), layer->config().top_k, num_tokens).facts)
    facts[py::str(name)] = value;
  return facts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MOESAIC_VERSION;
  info["compiler"] = MOESAIC_COMPILER;
  info["build_type"] = MOESAIC_BUILD_TYPE;
  info["threads"] = std::to_string(available_cpus());
  return info;
}

}  // namespace

void bind_info(py::module_& m) {
  py::class_<KernelInfo>(m, "KernelInfo", py::is_final())
      .def_readonly("operation", &KernelInfo::operation)
      .def_property_readonly("type",
                             [](const KernelInfo& k) { return std::string(traits(k.type).name); })
      .def_property_readonly("layout", [](const KernelInfo& k) { return name_of(k.layout); })
      .def_readonly("isa", &KernelInfo::isa)
      .def_readonly("name", &KernelInfo::name)
      .def("__repr__", [](const KernelInfo& k) { return "moesaic.KernelInfo(" + k.name + ")"; });
  py::class_<BackendObject>(m, "BackendInfo", py::is_final())
      .def_property_readonly("name", [](const BackendObject& b) { return b.info.name; })
      .def_property_readonly("available", [](const BackendObject& b) { return b.info.available; })
      .def_property_readonly("reason", [](const BackendObject& b) { return b.info.reason; })
      .def_property_readonly("devices",
                             [](const BackendObject& b) {
                               std::vector<std::string> names;
                               for (const Device device : b.info.devices)
                                 names.push_back(to_string(device));
                               return names;
                             })
      .def_property_readonly("detail", [](const BackendObject& b) { return b.info.detail; })
      .def_property_readonly("kernels", [](const BackendObject& b) { return b.kernels; })
      .def("__repr__", [](const BackendObject& b) {
        return "moesaic.BackendInfo(" + b.info.name + ", " +
               (b.info.available ? b.info.detail : "absent: " + b.info.reason) + ")";
      });

  m.def("backends", &list_backends);
  m.def("explain", &explain_layer, py::arg("layer"), py::arg("num_tokens") = 8);
  m.def("build_info", &build_info);
}

}  // namespace moesaic::python
