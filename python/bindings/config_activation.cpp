#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>

#include "config.hpp"
#include "fields.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

/// Other libraries name an activation by what it does to the gate alone, and "silu" is one letter
/// from another kind of ours.
ActivationKind parse_kind(const std::string& text, const char* operation) {
  constexpr std::pair<std::string_view, const char*> kOtherNames[] = {
      {"silu", "swiglu"}, {"swish", "swiglu"}, {"relu", "reglu"}, {"relu2", "relu_squared"}};
  try {
    return parse_name<ActivationKind>(text, operation, "activation");
  } catch (const ConfigError& error) {
    const auto* const other =
        std::ranges::find(kOtherNames, text, [](const auto& pair) { return pair.first; });
    if (other == std::end(kOtherNames)) throw;
    Problem problem = error.problem();
    problem.hint = std::string("here: ") + other->second;
    throw ConfigError(problem);
  }
}

Activation make_activation(const std::string& kind, float limit, float alpha, float beta,
                           float linear_beta) {
  const auto check = [](bool ok, const char* name, const char* expected, float got) {
    require<ConfigError>(ok, [&] {
      return Problem{"Activation", name, expected, py::repr(py::float_(as_written(got))), {}};
    });
  };
  check(limit > 0.0F, "limit", "a positive number", limit);
  check(std::isfinite(alpha), "alpha", "a finite number", alpha);
  check(std::isfinite(beta) && beta > 0.0F, "beta", "a positive number", beta);
  check(std::isfinite(linear_beta) && linear_beta >= 0.0F, "linear_beta",
        "a finite number, not negative", linear_beta);
  return {parse_kind(kind, "Activation"), limit, alpha, beta, linear_beta};
}

}  // namespace

Activation parse_activation(const py::object& value, const char* operation) {
  if (py::isinstance<Activation>(value)) return value.cast<Activation>();
  require<DTypeError>(py::isinstance<py::str>(value), [&] {
    return Problem{
        operation, "activation", "an Activation or its kind", Py_TYPE(value.ptr())->tp_name, {}};
  });
  Activation activation;
  activation.kind = parse_kind(text_bytes(value), operation);
  return activation;
}

void bind_activation(py::module_& m) {
  py::class_<Activation> activation(m, "Activation", py::is_final());
  activation
      .def(py::init(&make_activation), py::arg("kind") = "swiglu", py::kw_only(),
           py::arg("limit") = 7.0F, py::arg("alpha") = 1.702F, py::arg("beta") = 1.0F,
           py::arg("linear_beta") = 0.0F)
      .def_property_readonly("gated", &Activation::gated)
      .def("__call__", &activate, py::arg("g"), py::arg("u"));
  define_value(activation,
               Fields<Activation>("Activation")
                   .add("kind", &Activation::kind)
                   .add("limit", &Activation::limit)
                   .add("alpha", &Activation::alpha)
                   .add("beta", &Activation::beta)
                   .add("linear_beta", &Activation::linear_beta),
               constructed<Activation>());
}

}  // namespace moesaic::python
