#include "dtypes.hpp"

#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "base/nearest.hpp"
#include "moesaic/error.hpp"
#include "moesaic/quant.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

constexpr int kNumpyHalf = 23;

}  // namespace

std::optional<DType> dtype_of(const py::dtype& dtype) {
  switch (dtype.num()) {
    case py::detail::npy_api::NPY_FLOAT_:
      return DType::F32;
    case kNumpyHalf:
      return DType::F16;
    case py::detail::npy_api::NPY_DOUBLE_:
      return DType::F64;
    case py::detail::npy_api::NPY_UBYTE_:
      return DType::U8;
    case py::detail::npy_api::NPY_USHORT_:
      return DType::U16;
    case py::detail::npy_api::NPY_BOOL_:
      return DType::Bool;
    default:
      break;
  }
  if (dtype.kind() == 'i' && dtype.itemsize() == 4) return DType::I32;
  if (dtype.kind() == 'i' && dtype.itemsize() == 8) return DType::I64;
  // ml_dtypes registers bfloat16 under a number that differs from process to process.
  if (dtype.itemsize() == 2 && py::str(dtype.attr("name")).equal(py::str("bfloat16")))
    return DType::BF16;
  return std::nullopt;
}

DType parse_dtype(py::handle word, const char* operation, const char* name) {
  // A class, such as numpy.float32, says its name alone; other objects say it as text.
  const py::str said =
      PyType_Check(word.ptr()) != 0 ? py::str(word.attr("__name__")) : py::str(word);
  const std::string text = text_from_python(said).value_or("");
  const std::optional<DType> dtype = find_name<DType>(text);
  if (dtype && py::isinstance<py::str>(word)) return *dtype;
  const std::span<const char* const> names = names_of<DType>();
  const std::vector<std::string_view> known(names.begin(), names.end());
  const std::string_view nearest = dtype ? std::string_view(text) : nearest_word(text, known);
  throw DTypeError(Problem{operation, name, list_names<DType>(" | "), quoted_word(text),
                           nearest.empty() ? "" : "write '" + std::string(nearest) + "'"});
}

std::string quant_hint(const std::string& name) {
  std::vector<std::string_view> known;
  for (const QuantTraits& traits : quant_table()) known.push_back(traits.name);
  return nearest_hint(name, known);
}

py::dtype numpy_dtype(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return py::dtype::of<float>();
    case DType::F16:
      return py::dtype(kNumpyHalf);
    case DType::F64:
      return py::dtype::of<double>();
    case DType::I32:
      return py::dtype::of<std::int32_t>();
    case DType::I64:
      return py::dtype::of<std::int64_t>();
    case DType::U8:
      return py::dtype::of<std::uint8_t>();
    case DType::U16:
      return py::dtype::of<std::uint16_t>();
    case DType::Bool:
      return py::dtype::of<bool>();
    case DType::BF16:
      break;
  }
  return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
}

std::optional<DType> dtype_of_format(const char* format) {
  if (format == nullptr) return DType::U8;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (std::strlen(format) != 1) return std::nullopt;
  switch (*format) {
    case 'f':
      return DType::F32;
    case 'e':
      return DType::F16;
    case 'd':
      return DType::F64;
    case 'i':
      return DType::I32;
    case 'q':
      return DType::I64;
    case 'l':
      return sizeof(long) == 8 ? DType::I64 : DType::I32;
    case 'B':
    case 'b':
    case 'c':
      return DType::U8;
    case 'H':
      return DType::U16;
    case '?':
      return DType::Bool;
    default:
      return std::nullopt;
  }
}

std::string buffer_format(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return "f";
    case DType::F16:
      return "e";
    case DType::BF16:
    case DType::U16:
      return "H";
    case DType::F64:
      return "d";
    case DType::I32:
      return "i";
    case DType::I64:
      return "q";
    case DType::U8:
      return "B";
    case DType::Bool:
      return "?";
  }
  return "B";
}

}  // namespace moesaic::python
