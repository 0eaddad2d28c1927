#pragma once

/// Element types as numpy and the buffer protocol spell them. DLPack's spelling is in dlpack.cpp.

#include <pybind11/numpy.h>

#include <optional>
#include <string>

#include "bindings.hpp"
#include "moesaic/types.hpp"

namespace moesaic::python {

/// The element type of a numpy descriptor; empty for one without a name here.
std::optional<DType> dtype_of(const py::dtype& dtype);

/// The element type that a word names. Throws DTypeError, whose hint has the word that was meant,
/// also where it is given as numpy or torch spell it.
DType parse_dtype(py::handle word, const char* operation, const char* name);

/// The hint for a word that names no type of ggml: "nearest: Q4_K", or nothing.
std::string quant_hint(const std::string& name);

/// The numpy descriptor of an element type; bf16 needs ml_dtypes.
py::dtype numpy_dtype(DType dtype);

/// The element type of a buffer's format (PEP 3118), where null means bytes; empty for one without
/// a name here.
std::optional<DType> dtype_of_format(const char* format);

/// The format of an element type. There is none for bfloat16, so that a buffer shows the bits of
/// one as uint16.
std::string buffer_format(DType dtype);

}  // namespace moesaic::python
