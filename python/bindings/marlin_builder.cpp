/// MarlinStackBuilder: experts one by one, for checkpoints that hold them so.

#include <pybind11/stl.h>

#include "calls.hpp"
#include "gil.hpp"
#include "marlin.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

using Builder = MarlinExpertStack::Builder;

std::unique_ptr<Builder> make_marlin_builder(std::int32_t num_experts, std::int64_t k,
                                             std::int64_t n_per_expert, std::int64_t group_size,
                                             const std::string& format, bool f32_scales, bool zeros,
                                             const py::object& g_idx) {
  constexpr const char* kOperation = "MarlinStackBuilder";
  ArrayRef order;
  if (!g_idx.is_none()) order = import_array(g_idx, kOperation, "g_idx");
  const MarlinExpertStack::Spec spec{
      .num_experts = num_experts,
      .k = k,
      .n_per_expert = n_per_expert,
      .group_size = group_size,
      .format = parse_name<CheckpointFormat>(format, kOperation, "format"),
      .scale_dtype = f32_scales ? DType::F32 : DType::F16,
      .zeros = zeros,
      .g_idx = order.read()};
  return std::make_unique<Builder>(spec);
}

void add_part(Builder& builder, std::int32_t expert, std::int64_t first_col,
              const py::object& qweight, const py::object& scales, const py::object& qzeros,
              const Text& name) {
  const TensorRefs refs("MarlinStackBuilder.add", qweight, scales, qzeros, py::none());
  const auto pool = shared_pool(current_tuning());
  const InterruptibleRelease release;
  builder.add(expert, first_col, refs.tensors, name.bytes, pool.get());
}

}  // namespace

void bind_marlin_builder(py::module_& m) {
  py::class_<Builder>(m, "MarlinStackBuilder", py::is_final())
      .def(py::init(&make_marlin_builder), py::arg("num_experts"), py::arg("k"),
           py::arg("n_per_expert"), py::arg("group_size"), py::arg("format"), py::kw_only(),
           py::arg("f32_scales") = false, py::arg("zeros") = true, py::arg("g_idx") = py::none())
      .def("add", &add_part, py::arg("expert"), py::arg("first_col"), py::arg("qweight"),
           py::arg("scales"), py::arg("qzeros"), py::arg("name"))
      .def("build", [](Builder& builder) {
        return std::make_shared<MarlinExpertStack>(std::move(builder).build());
      });
}

}  // namespace moesaic::python
