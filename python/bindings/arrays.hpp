#pragma once

/// Arrays of the caller. numpy is asked first, then the buffer protocol, then __dlpack__; a copy is
/// made by import_rows and import_f32 alone, and no array package but numpy is ever imported.

#include <memory>
#include <string>
#include <vector>

#include "moesaic/backend.hpp"
#include "views.hpp"

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
  py::object keep{};
  SharedHandle handle{};  ///< of memory that came by one, known to its backend while this lives

  ConstTensorView read() const { return view; }
};

/// Where a call takes its arrays: the device, and on a GPU with memory of its own the stream that its
/// launches join. A device that shares the host's memory takes arrays of the host (HostArrays).
struct DeviceStream {
  Device device{};
  void* stream = nullptr;  ///< null: the default stream of the device
  /// Takes memory that packages know by a handle, too (kDLMetal); null where none does.
  const Backend* handles = nullptr;
};

/// Borrows an array of the caller. Errors: DTypeError (not an array, or an element type without a
/// name here), DeviceError (not in the memory of the target's device), ShapeError (rank > 4,
/// unaligned), UnsupportedError (a tensor with gradients). Memory of a GPU is ready for the
/// target's stream.
ArrayRef import_array(py::handle object, const char* operation, const char* name,
                      const DeviceStream& target = {});

/// Throws DTypeError for other elements than f32, f16 or bf16, with the call that converts `object`.
void require_float(const ArrayRef& ref, py::handle object, const char* operation, const char* name);

/// How the rows of an array have to lie.
enum class RowLayout : std::uint8_t {
  Rows,   ///< the elements of a row one behind the other
  Dense,  ///< the rows too
};

/// import_array for rows of f32, f16 or bf16: in host memory, columns that lie apart are copied. A
/// copy is logged at debug level. Throws DTypeError, whose hint names the call that converts.
ArrayRef import_rows(py::handle object, const char* operation, const char* name,
                     const DeviceStream& target = {});
/// import_array for values that a call reads as f32: f16 and bf16 are converted, and in host memory
/// elements that lie otherwise than `layout` says are copied. A copy is logged at debug level.
/// Throws DTypeError as import_rows does.
ArrayRef import_f32(py::handle object, const char* operation, const char* name,
                    const DeviceStream& target = {}, RowLayout layout = RowLayout::Rows);

/// Rows of an array whose leading dimensions count as one.
struct TokenRows {
  ArrayRef array;   ///< as it came
  TensorView rows;  ///< [T, width]; of fewer dimensions for an array of fewer

  /// The shape of a result with `width` values for each row.
  std::vector<std::int64_t> shape(std::int64_t width) const;
};
/// [..., width] as import_rows imports it, as [T, width]. Where no single stride walks the rows, host
/// memory is copied; on a GPU that is a ShapeError.
TokenRows import_tokens(py::handle object, const char* operation, const char* name,
                        const DeviceStream& target = {});
/// [..., width] as import_f32 imports it, as [T, width]; strides and errors as in import_tokens.
TokenRows import_f32_tokens(py::handle object, const char* operation, const char* name,
                            const DeviceStream& target = {}, RowLayout layout = RowLayout::Rows);
/// The first `count` dimensions of an imported array as one, of a copy in host memory if need be.
/// Throws ShapeError where there are fewer, or on a GPU where no single stride walks them.
TensorView merged_in(ArrayRef& ref, int count, const char* operation, const char* name,
                     const DeviceStream& target = {});
/// The first `count` dimensions of what a call writes to as one. Throws ShapeError for an out= that
/// no single stride walks.
TensorView merged_out(const TensorView& out, int count, const char* operation);

/// Memory made here, exported by DLPack and the buffer protocol.
struct Array {
  TensorView view;
  bool read_only = false;
  std::shared_ptr<void> owner;
};
/// New memory: 64-byte aligned, dense, not initialised. Throws OutOfMemoryError, and ShapeError
/// when its size does not fit in 63 bits.
std::shared_ptr<Array> new_array(DType dtype, const std::vector<std::int64_t>& shape);

/// A dense copy of one.
std::shared_ptr<Array> copy_of(const Array& source);
/// Its values as a numpy array: a view, or a copy in f32 of bf16, which numpy lacks.
py::object numpy_values(const std::shared_ptr<Array>& array);

/// The bytes of a dense array. Throws ShapeError when they do not fit in 63 bits.
std::int64_t dense_bytes(DType dtype, const std::vector<std::int64_t>& shape,
                         const char* operation);

/// What errors call the type of an object, e.g. "numpy.ndarray".
std::string type_name(py::handle object);

}  // namespace moesaic::python
