#include "values.hpp"

#include <cstring>
#include <limits>

#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace

Ids import_ids(py::handle object, const char* operation, const char* name,
               const DeviceStream& target) {
  Ids ids;
  ids.array = import_array(object, operation, name, target);
  ids.view = ids.array.view;
  const DType dtype = ids.view.dtype;
  if (target.device.type != DeviceType::Cpu) {
    require<DTypeError>(dtype == DType::I32, [&] {
      return Problem{operation, name, "int32 on " + to_string(target.device), name_of(dtype), {}};
    });
    require<ShapeError>(is_dense(ids.view), [&] {
      return Problem{operation, name, "a dense array", "strides", "pass a contiguous copy"};
    });
    return ids;
  }
  require<DTypeError>(dtype == DType::I32 || dtype == DType::I64, [&] {
    return Problem{operation, name, "int32 or int64", name_of(dtype), {}};
  });
  const auto count = static_cast<std::size_t>(ids.view.num_elements());
  const std::vector<std::int64_t> shape(ids.view.shape.begin(),
                                        ids.view.shape.begin() + ids.view.rank);
  if (dtype == DType::I32 && is_dense(ids.view)) {
    const auto* from = static_cast<const std::int32_t*>(ids.view.data);
    ids.copy.assign(from, from + count);
    ids.view = dense_view(ids.copy.data(), DType::I32, shape);
    return ids;
  }
  ids.copy.reserve(count);
  for_each_element(ids.view, [&](const std::byte* element) {
    const std::int64_t value =
        dtype == DType::I32 ? load<std::int32_t>(element) : load<std::int64_t>(element);
    require<ShapeError>(
        value >= std::numeric_limits<std::int32_t>::min() &&
            value <= std::numeric_limits<std::int32_t>::max(),
        [&] {
          return Problem{operation, name, "ids in the range of int32", std::to_string(value), {}};
        });
    ids.copy.push_back(static_cast<std::int32_t>(value));
  });
  ids.view = dense_view(ids.copy.data(), DType::I32, shape);
  return ids;
}

void Ids::merge_first(int count) {
  if (count <= 1) return;
  std::vector<std::int64_t> shape{1};
  for (int i = 0; i < view.rank; ++i) {
    if (i < count) {
      shape.front() *= view.dim(i);
    } else {
      shape.push_back(view.dim(i));
    }
  }
  const Device device = view.device;
  view = dense_view(const_cast<void*>(view.data), view.dtype, shape);
  view.device = device;
}

std::vector<float> import_floats(py::handle object, const char* operation, const char* name) {
  const ArrayRef ref = import_array(object, operation, name);
  require_float(ref, object, operation, name);
  const DType dtype = ref.view.dtype;
  std::vector<float> values;
  values.reserve(static_cast<std::size_t>(ref.view.num_elements()));
  for_each_element(ref.view, [&](const std::byte* element) {
    if (dtype == DType::F32)
      values.push_back(load<float>(element));
    else if (dtype == DType::F16)
      values.push_back(f16_to_f32(load<std::uint16_t>(element)));
    else
      values.push_back(bf16_to_f32(load<std::uint16_t>(element)));
  });
  return values;
}

}  // namespace moesaic::python
