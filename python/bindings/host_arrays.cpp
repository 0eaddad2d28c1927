/// Arrays of the host in a call on a device that shares the host's memory.

#include "host_arrays.hpp"

#include <cstring>
#include <exception>

#include "devices.hpp"

namespace moesaic::python {
namespace {

/// Bytes from the first element to the end of the last one; 0 where a stride goes backwards.
std::size_t extent_of(const ConstTensorView& view) {
  std::int64_t last = 0;
  for (int i = 0; i < view.rank; ++i) {
    if (view.dim(i) > 1 && view.stride(i) < 0) return 0;
    last += (view.dim(i) - 1) * view.stride(i);
  }
  return static_cast<std::size_t>(last + 1) * size_of(view.dtype);
}

/// The elements of `from`, which has the shape of the dense `to`.
void copy_to_dense(const ConstTensorView& from, const TensorView& to) {
  const std::size_t item = size_of(from.dtype);
  auto* at = static_cast<std::byte*>(to.data);
  if (is_dense(from)) {
    std::memcpy(at, from.data, static_cast<std::size_t>(from.num_elements()) * item);
    return;
  }
  for_each_element(from, [&](const std::byte* element) {
    std::memcpy(at, element, item);
    at += item;
  });
}

void copy_from_dense(const ConstTensorView& from, const TensorView& to) {
  const std::size_t item = size_of(from.dtype);
  const auto* at = static_cast<const std::byte*>(from.data);
  if (is_dense(to)) {
    std::memcpy(to.data, at, static_cast<std::size_t>(from.num_elements()) * item);
    return;
  }
  for_each_element(to, [&](const std::byte* element) {
    std::memcpy(const_cast<std::byte*>(element), at, item);
    at += item;
  });
}

}  // namespace

HostArrays::HostArrays(Context& context)
    : context_(context), shares_(shares_host_memory(context.backend().device())) {}

HostArrays::~HostArrays() {
  if (!shares_ || finished_) return;
  try {
    context_.backend().synchronize(context_);
  } catch (...) {  // that which ended the call is on its way
    context_.keep_error(std::current_exception());
  }
}

TensorView HostArrays::place(const TensorView& view, bool written) {
  if (!shares_) return view;
  const Backend& backend = context_.backend();
  TensorView placed = view;
  placed.device = backend.device();
  if (view.empty()) return placed;
  const std::size_t extent = extent_of(view);
  if (auto shared = extent != 0 ? backend.share(view.data, extent) : nullptr) {
    held_.push_back(std::move(shared));
    return placed;
  }
  const std::size_t bytes = static_cast<std::size_t>(view.num_elements()) * size_of(view.dtype);
  const std::shared_ptr<void> copy(backend.allocate(bytes),
                                   [&backend, bytes](void* p) { backend.deallocate(p, bytes); });
  placed = dense_view(copy.get(), view.dtype, {view.shape.begin(), view.shape.begin() + view.rank});
  placed.device = backend.device();
  copy_to_dense(view, placed);
  held_.push_back(copy);
  if (written) copies_.push_back({placed, view});
  return placed;
}

ConstTensorView HostArrays::read(const ConstTensorView& view) {
  if (!shares_) return view;
  TensorView given;
  given.data = const_cast<void*>(view.data);
  given.dtype = view.dtype;
  given.rank = view.rank;
  given.shape = view.shape;
  given.strides = view.strides;
  given.device = view.device;
  return place(given, false);
}

TensorView HostArrays::write(const TensorView& view) { return place(view, true); }

void HostArrays::finish() {
  if (!shares_) return;
  finished_ = true;
  context_.backend().synchronize(context_);
  for (const Copy& copy : copies_) copy_from_dense(copy.there, copy.home);
}

}  // namespace moesaic::python
