#pragma once

/// Arrays of the caller in, arrays of the same kind out. numpy is asked first, then the buffer
/// protocol, then __dlpack__; never a copy, and no array package but numpy is ever imported.

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "moesaic/types.hpp"

namespace moesaic::python {

/// The kind of a caller's array, which its results share.
enum class ArrayKind : std::uint8_t {
  Numpy,    ///< numpy or any other buffer: results are numpy arrays
  Own,      ///< moesaic.Array
  Foreign,  ///< results pass through from_dlpack of the package of its type
};

/// An array of the caller. `keep` holds the memory for as long as this object lives.
struct ArrayRef {
  TensorView view;
  bool read_only = false;
  ArrayKind kind = ArrayKind::Numpy;
  py::object keep;

  ConstTensorView read() const { return view; }
};

/// Where a call works: its device, and on a GPU the stream that its launches join.
struct Place {
  Device device{};
  void* stream = nullptr;  ///< null: the default stream of the device
};

/// Errors: DTypeError (not an array, or an element type without a name here), DeviceError (not
/// in the memory of `place`), ShapeError (rank > 4, unaligned), UnsupportedError (a tensor with
/// gradients). Memory of a GPU is ready for the place's stream.
ArrayRef import_array(py::handle object, const char* operation, const char* name,
                      const Place& place = {});

/// Memory made here, exported by DLPack and the buffer protocol.
struct Array {
  TensorView view;
  bool read_only = false;
  std::shared_ptr<void> owner;
};
/// 64-byte aligned, dense, not initialised. Throws OutOfMemoryError.
std::shared_ptr<Array> new_array(DType dtype, const std::vector<std::int64_t>& shape);

/// The place a call writes to: `out` when given, else a new array of the kind of `like`.
class Result {
 public:
  /// Errors: for `out` as import_array; ShapeError (another shape), DTypeError (not `dtype`, or
  /// when `any_float`, not f32, f16 or bf16), ConfigError (read-only). On a GPU the array package
  /// of `like` makes the array; UnsupportedError when it cannot.
  Result(py::handle like, const ArrayRef& like_ref, DType dtype,
         const std::vector<std::int64_t>& shape, py::handle out, const char* operation,
         bool any_float = false, const Place& place = {});
  TensorView view() const { return view_; }
  /// The object to return. Call once, with the GIL.
  py::object finish();

 private:
  /// Takes `object` as what the call writes to.
  void write_to(py::object object, const char* operation, const Place& place);
  TensorView view_;
  py::object object_;  ///< a numpy array, the caller's out, or a package's own
  ArrayRef out_;
  std::shared_ptr<Array> array_;
  py::handle like_;
  bool foreign_ = false;
};

/// A read-only numpy array over memory that `owner` keeps alive.
py::array numpy_view(DType dtype, const std::vector<std::int64_t>& shape, const void* data,
                     std::shared_ptr<const void> owner);

/// A Python object as an owner that C++ may let go of on any thread.
std::shared_ptr<void> share_object(py::object object);

/// The numpy descriptor of an element type; bf16 needs ml_dtypes.
py::dtype numpy_dtype(DType dtype);

/// int32 or int64 ids as dense int32: the caller's memory when it is that already, else a copy.
struct Ids {
  ArrayRef array;
  std::vector<std::int32_t> copy;
  ConstTensorView view;
};
/// Errors: as import_array; DTypeError (not int32 or int64; on a GPU not int32), ShapeError (beyond
/// int32; on a GPU not dense).
Ids import_ids(py::handle object, const char* operation, const char* name, const Place& place = {});

/// An f32, f16 or bf16 array as a vector of f32. Errors as import_array, and DTypeError.
std::vector<float> import_floats(py::handle object, const char* operation, const char* name);

/// Whether two views share memory (by their outermost addresses).
bool overlaps(const ConstTensorView& a, const ConstTensorView& b);
/// Throws ShapeError when `out` shares memory with `in`.
void require_disjoint(const ConstTensorView& out, const ConstTensorView& in, const char* operation,
                      const char* name);

std::string type_name(py::handle object);
bool is_dense(const ConstTensorView& view);

}  // namespace moesaic::python
