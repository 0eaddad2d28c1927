/// MarlinExpertStack: how it is made, and what it says of itself.

#include <pybind11/stl.h>

#include "calls.hpp"
#include "gil.hpp"
#include "load.hpp"
#include "marlin.hpp"
#include "values.hpp"

namespace moesaic::python {
namespace {

using MarlinStack = std::shared_ptr<MarlinExpertStack>;

MarlinStack from_gptq(const py::object& qweight, const py::object& scales, const py::object& qzeros,
                      const py::object& g_idx, std::int64_t group_size, const std::string& format) {
  constexpr const char* kOperation = "MarlinExpertStack.from_gptq";
  TensorRefs refs(kOperation, qweight, scales, qzeros, g_idx);
  refs.tensors.group_size = group_size;
  refs.tensors.format = parse_name<CheckpointFormat>(format, kOperation, "checkpoint_format");
  const auto pool = shared_pool(current_tuning());
  const InterruptibleRelease release;
  return std::make_shared<MarlinExpertStack>(
      MarlinExpertStack::from_gptq(refs.tensors, pool.get()));
}

MarlinStack to_device(const MarlinExpertStack& stack, const std::string& device) {
  Loading loading("MarlinExpertStack.to", device, "auto", std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return std::make_shared<MarlinExpertStack>(stack.to(options));
  });
}

MarlinLinear make_expert_linear(const MarlinExpertStack& stack, std::int32_t expert,
                                std::int64_t first_col, const std::optional<std::int64_t>& cols,
                                const py::object& bias) {
  std::vector<float> values;
  if (!bias.is_none()) values = import_floats(bias, "make_expert_linear", "bias");
  require<ShapeError>(!cols || *cols >= 1, [&] {
    return Problem{"make_expert_linear", "cols", "at least 1, or None", std::to_string(*cols), {}};
  });
  require<ShapeError>(bias.is_none() || !values.empty(), [&] {
    return Problem{"make_expert_linear", "bias", "one value per column", "none", {}};
  });
  return stack.make_expert_linear(expert, first_col, cols.value_or(-1), std::move(values));
}

std::string marlin_repr(const MarlinExpertStack& m) {
  return "moesaic.MarlinExpertStack(num_experts=" + std::to_string(m.num_experts()) +
         ", k=" + std::to_string(m.k()) + ", n_per_expert=" + std::to_string(m.n_per_expert()) +
         ", group_size=" + std::to_string(m.group_size()) +
         (m.symmetric() ? ", symmetric" : ", zero points") + (m.act_order() ? ", act_order" : "") +
         (m.device() == Device{} ? "" : ", " + to_string(m.device())) + ", " +
         std::to_string(m.nbytes()) + " bytes)";
}

}  // namespace

void bind_marlin_stack(py::module_& m) {
  MarlinClass type(m, "MarlinExpertStack", py::is_final());
  type.def_static("from_gptq", &from_gptq, py::arg("qweight"), py::arg("scales"),
                  py::arg("qzeros") = py::none(), py::arg("g_idx") = py::none(),
                  py::arg("group_size") = 128, py::arg("checkpoint_format") = "gptq")
      .def_property_readonly("num_experts", &MarlinExpertStack::num_experts)
      .def_property_readonly("k", &MarlinExpertStack::k)
      .def_property_readonly("n_per_expert", &MarlinExpertStack::n_per_expert)
      .def_property_readonly("group_size", &MarlinExpertStack::group_size)
      .def_property_readonly("symmetric", &MarlinExpertStack::symmetric)
      .def_property_readonly("act_order", &MarlinExpertStack::act_order)
      .def_property_readonly("nbytes", &MarlinExpertStack::nbytes)
      .def_property_readonly("device",
                             [](const MarlinExpertStack& s) { return to_string(s.device()); })
      .def("to", &to_device, py::arg("device"))
      .def("zero_workspace", &MarlinExpertStack::zero_workspace)
      .def("make_expert_linear", &make_expert_linear, py::arg("expert"), py::arg("first_col") = 0,
           py::arg("cols") = py::none(), py::arg("bias") = py::none())
      .def("__repr__", &marlin_repr);
  define_marlin_layouts(type);
  define_marlin_products(type);
}

}  // namespace moesaic::python
