#pragma once

#include "arrays.hpp"

namespace moesaic::python {

/// Makes the arrays of a package out of memory that was made here.
class ArrayMaker {
 public:
  /// Makes arrays of numpy.
  ArrayMaker() = default;
  /// Makes arrays of the package of `like`, which has this kind.
  ArrayMaker(py::handle like, ArrayKind kind);
  /// The maker of the package that an array of the caller is of.
  static ArrayMaker like(py::handle array);
  py::object operator()(const std::shared_ptr<Array>& array) const;
  ArrayKind kind() const { return kind_; }

 private:
  ArrayKind kind_ = ArrayKind::Numpy;
  py::object from_dlpack_;  ///< of a foreign package; null or None when it has none
};

/// New memory of a GPU as an object that exports it by __dlpack__, its values being there. Throws
/// OutOfMemoryError.
py::object device_memory(DType dtype, const std::vector<std::int64_t>& shape, Device device,
                         const char* operation);

/// What a call writes to: `out` when given, else a new array of the kind of `like`.
class Result {
 public:
  /// Errors: for `out` as import_array; ShapeError (another shape), DTypeError (not `dtype`, or
  /// when `any_float`, not f32, f16 or bf16), ConfigError (read-only). On a GPU the array package
  /// of `like` makes the array, or takes memory that was made here; UnsupportedError when it can do
  /// neither.
  Result(py::handle like, const ArrayRef& like_ref, DType dtype,
         const std::vector<std::int64_t>& shape, py::handle out, const char* operation,
         bool any_float = false, const DeviceStream& target = {});
  TensorView view() const { return view_; }
  /// The object to return. Call once, with the GIL.
  py::object finish();

 private:
  void make_on_device(const ArrayRef& like_ref, DType dtype, const std::vector<std::int64_t>& shape,
                      const char* operation, const DeviceStream& target);
  py::object hand_over();
  /// Makes `object` what the call writes to.
  void write_to(py::object object, const char* operation, const DeviceStream& target);
  TensorView view_;
  py::object object_;  ///< a numpy array, the caller's out, or a package's own
  ArrayRef out_;
  std::shared_ptr<Array> array_;
  py::handle like_;
  bool foreign_ = false;
  DeviceStream target_;
};

}  // namespace moesaic::python
