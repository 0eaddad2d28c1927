#pragma once

/// What a stack is made of beside its matrices, from and to Python.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "expert_stack.hpp"
#include "moesaic/edit.hpp"
#include "moesaic/error.hpp"
#include "moesaic/names.hpp"

namespace moesaic::python {

/// One role as `from_encoded` takes it: (bytes, type name, (E, rows, cols)), or (array [E, rows,
/// row_bytes], type name); empty for None. Errors: those of the arrays, ConfigError for an unknown
/// type, ShapeError naming the role.
ExpertStack::EncodedRole encoded_role(const py::object& argument, const char* operation,
                                      const char* name);

/// `biases` {role: [E, rows]} and `scales` {role: [E]}, each a dict or None. Errors: ConfigError for
/// an unknown role, ShapeError and DTypeError naming the array.
Epilogues import_epilogues(const py::object& biases, const py::object& scales,
                           const StackShape& shape, const char* operation);

/// Calls take(role, value, name for errors) for the entries of a dict by role that are not None.
template <class Take>
void for_each_role(const py::object& by_role, const char* parameter, const char* operation,
                   const Take& take) {
  if (by_role.is_none()) return;
  require<DTypeError>(py::isinstance<py::dict>(by_role), [&] {
    return Problem{operation, parameter, "a dict of arrays by role", type_name(by_role), {}};
  });
  for (const auto& [key, value] : by_role.cast<py::dict>()) {
    const auto role = parse_name<Role>(std::string(py::str(key)), operation, parameter);
    if (value.is_none()) continue;
    take(role, value, std::string(parameter) + "['" + name_of(role) + "']");
  }
}

/// `quant` as a type name for all roles, as a dict by role, or None. Errors: ConfigError for an
/// unknown type or role, DTypeError.
RoleTypes import_role_types(const py::object& quant, const char* operation);

/// An array of this shape as f32. Throws ShapeError and DTypeError.
std::vector<float> values_of_shape(py::handle value, const std::vector<std::int64_t>& shape,
                                   const std::string& name, const char* operation);

/// A matrix on its own as f32 [rows, cols], times its scale.
py::array decoded_matrix(const RoleWeights& weights, const char* operation);
/// Its stored rows, uint8 [rows, row bytes].
py::array encoded_matrix(const RoleWeights& weights);

/// Adds what makes stacks of the experts of others.
void define_edits(StackClass& type);

/// Adds what a stack says of its parts: encoded, dequantize, biases, scales.
void define_parts(StackClass& type);

}  // namespace moesaic::python
