#include "cuda/backend/device.hpp"

#include "moesaic/error.hpp"

namespace moesaic::cuda {

Gpu::Current::Current(const Gpu& gpu) : gpu_(gpu) {
  gpu_.check("enter_device", gpu_.table_->enter_device(gpu_.index_, &previous_));
}

Gpu::Current::~Current() { gpu_.table_->leave_device(previous_); }

void Gpu::check(const char* operation, std::int32_t error) const {
  if (error == kOk) [[likely]]
    return;
  const Problem problem{.operation = operation,
                        .what = to_string(device()),
                        .expected = {},
                        .got = table_->error_text(error),
                        .hint = table_->is_sticky(error)
                                    ? "an earlier kernel may be the cause; this process cannot use "
                                      "the GPU any more, start a new one"
                                    : ""};
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
  // Whatever will be recorded into a graph has had memory allocated for it before.
  load_operations();
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
  void* previous = nullptr;
  if (table_->enter_device(index_, &previous) != kOk) return;
  table_->deallocate(memory);
  table_->leave_device(previous);
}

void Gpu::upload(void* to, const void* from, std::size_t bytes) const {
  if (bytes == 0) return;
  const Current current(*this);
  check("upload", table_->upload(to, from, static_cast<std::int64_t>(bytes)));
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

void Gpu::load_products(const WeightRef& weight) const {
  if (!weight) return;
  const Current current(*this);
  check("load_products", table_->load_products(&weight));
}

void Gpu::load_operations() const {
  if (operations_loaded_.load(std::memory_order_relaxed)) return;
  check("load_operations", table_->load_operations());
  operations_loaded_.store(true, std::memory_order_relaxed);
}

}  // namespace moesaic::cuda
