#pragma once

#include <string>

#include "bindings.hpp"
#include "moesaic/operands.hpp"

namespace moesaic::python {

/// The type of this name, which the argument `what` gives. Throws ConfigError, with the name that was
/// meant as the hint.
QuantType parse_quant_type(const std::string& name, const char* operation,
                           const char* what = "quant");

}  // namespace moesaic::python
