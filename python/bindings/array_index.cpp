/// Basic indexing of moesaic.Array: integers, slices and the ellipsis give views, as numpy's do.

#include "array_index.hpp"

#include "moesaic/error.hpp"
#include "signature.hpp"

namespace moesaic::python {
namespace {

void require_index(bool ok, const std::string& message) {
  if (!ok) throw py::index_error("moesaic.Array: " + message);
}

/// The keys one by one, with an ellipsis as the full slices that it stands for.
std::vector<py::object> expand(const py::object& key, int rank) {
  const py::tuple keys = py::isinstance<py::tuple>(key) ? py::tuple(key) : py::make_tuple(key);
  int given = 0;
  bool ellipsis = false;
  for (const py::handle one : keys) {
    const bool dots = one.is(py::ellipsis());
    require_index(!dots || !ellipsis, "an index has one ellipsis at most");
    ellipsis |= dots;
    given += dots ? 0 : 1;
  }
  require_index(given <= rank,
                std::to_string(given) + " indices for " + std::to_string(rank) + " dimensions");
  std::vector<py::object> expanded;
  const py::slice all{py::none(), py::none(), py::none()};
  for (const py::handle one : keys) {
    if (!one.is(py::ellipsis())) {
      expanded.push_back(py::reinterpret_borrow<py::object>(one));
      continue;
    }
    expanded.insert(expanded.end(), static_cast<std::size_t>(rank - given), all);
  }
  expanded.resize(static_cast<std::size_t>(rank), all);
  return expanded;
}

std::int64_t position(py::handle index, std::int64_t size, int dimension) {
  std::int64_t at = PyNumber_AsSsize_t(index.ptr(), PyExc_IndexError);
  if (at == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  const std::int64_t given = at;
  if (at < 0) at += size;
  require_index(at >= 0 && at < size, "index " + std::to_string(given) + " of dimension " +
                                          std::to_string(dimension) + ", which has " +
                                          std::to_string(size));
  return at;
}

}  // namespace

py::object index_array(const std::shared_ptr<Array>& array, const py::object& key) {
  const TensorView& from = array->view;
  const std::vector<py::object> keys = expand(key, from.rank);
  TensorView to = from;
  to.rank = 0;
  std::int64_t offset = 0;
  for (int i = 0; i < from.rank; ++i) {
    const py::object& one = keys[static_cast<std::size_t>(i)];
    if (py::isinstance<py::slice>(one)) {
      py::ssize_t start = 0, stop = 0, step = 0;
      if (PySlice_Unpack(one.ptr(), &start, &stop, &step) < 0) throw py::error_already_set();
      const py::ssize_t length = PySlice_AdjustIndices(from.dim(i), &start, &stop, step);
      if (length > 0) offset += start * from.stride(i);
      to.shape[static_cast<std::size_t>(to.rank)] = length;
      to.strides[static_cast<std::size_t>(to.rank++)] = from.stride(i) * step;
      continue;
    }
    require<DTypeError>(PyIndex_Check(one.ptr()) != 0 && PyBool_Check(one.ptr()) == 0, [&] {
      return Problem{"Array", "index", "integers, slices or an ellipsis", object_text(one),
                     "numpy.asarray(it) takes other indices"};
    });
    offset += position(one, from.dim(i), i) * from.stride(i);
  }
  to.data =
      static_cast<std::byte*>(from.data) + offset * static_cast<std::int64_t>(size_of(from.dtype));
  const auto view = std::make_shared<Array>();
  view->view = to;
  view->read_only = array->read_only;
  view->owner = array->owner;
  if (to.rank > 0) return py::cast(view);
  return numpy_values(view).attr("item")();
}

}  // namespace moesaic::python
