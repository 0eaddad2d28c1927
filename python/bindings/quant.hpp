#pragma once

#include <string>

#include "bindings.hpp"
#include "moesaic/operands.hpp"

namespace moesaic::python {

/// The type of this name. Throws ConfigError, with the name that was meant as the hint.
QuantType parse_quant_type(const std::string& name, const char* operation);

}  // namespace moesaic::python
