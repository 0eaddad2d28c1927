#include "cuda/backend/device.hpp"

#include "moesaic/error.hpp"

namespace moesaic::cuda {

Gpu::Current::Current(const Gpu& gpu) : gpu_(gpu) {
  gpu_.check("set_device", gpu_.table_->set_device(gpu_.index_, &previous_));
}

Gpu::Current::~Current() {
  std::int32_t ignored = 0;
  if (previous_ != gpu_.index_) gpu_.table_->set_device(previous_, &ignored);
}

void Gpu::check(const char* operation, std::int32_t error) const {
  if (error == kOk) [[likely]]
    return;
  const Problem problem{.operation = operation,
                        .what = to_string(device()),
                        .expected = {},
                        .got = table_->error_text(error),
                        .hint = {}};
  if (error == kUnsupported) throw UnsupportedError(problem);
  throw DeviceError(problem);
}

DeviceProperties Gpu::properties() const {
  DeviceProperties properties{};
  check("device_properties", table_->device_properties(index_, &properties));
  return properties;
}

void* Gpu::allocate(std::size_t bytes) const {
  if (bytes == 0) return nullptr;
  const Current current(*this);
  void* memory = nullptr;
  const std::int32_t error = table_->allocate(static_cast<std::int64_t>(bytes), &memory);
  require<OutOfMemoryError>(error == kOk && memory != nullptr, [&] {
    return Problem{.operation = "allocate",
                   .what = to_string(device()),
                   .expected = std::to_string(bytes) + " bytes",
                   .got = table_->error_text(error),
                   .hint = {}};
  });
  return memory;
}

void Gpu::deallocate(void* memory) const noexcept {
  if (memory == nullptr) return;
  std::int32_t previous = 0;
  if (table_->set_device(index_, &previous) != kOk) return;
  table_->deallocate(memory);
  table_->set_device(previous, &previous);
}

void Gpu::copy(void* to, const void* from, std::size_t bytes) const {
  copy(to, from, bytes, nullptr);
  synchronize(nullptr);
}

void Gpu::copy(void* to, const void* from, std::size_t bytes, Stream stream) const {
  if (bytes == 0) return;
  const Current current(*this);
  check("copy", table_->copy(to, from, static_cast<std::int64_t>(bytes), stream));
}

void Gpu::synchronize(Stream stream) const {
  const Current current(*this);
  check("synchronize", table_->synchronize(stream));
}

bool Gpu::capturing(Stream stream) const {
  const Current current(*this);
  std::int32_t yes = 0;
  // While another stream records a graph, asking about the default stream is itself an error; that
  // counts as capturing.
  return table_->is_capturing(stream, &yes) != kOk || yes != 0;
}

}  // namespace moesaic::cuda
