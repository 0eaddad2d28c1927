#include "ops/call_memory.hpp"

#include <string>

#include "moesaic/error.hpp"

namespace moesaic::ops {
namespace {

constexpr std::size_t kAlign = 64;

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

template <class T>
std::span<const std::byte> bytes_of(const T* data, std::int64_t count) {
  return std::as_bytes(std::span(data, data != nullptr ? static_cast<std::size_t>(count) : 0));
}

const std::int32_t* ids_at(const std::byte* address) {
  return reinterpret_cast<const std::int32_t*>(address);
}

}  // namespace

void require_no_capture(const char* operation, const Context& context, const char* what) {
  require<CaptureError>(!context.backend().capturing(context), [&] {
    return Problem{.operation = operation,
                   .what = what,
                   .expected = "a stream that records no graph",
                   .got = "a capture",
                   .hint = "the forwards take a workspace"};
  });
}

CallMemory::CallMemory(const char* operation, Context& context)
    : operation_(operation),
      context_(context),
      backend_(context.backend()),
      reads_host_(backend_.device_type() == DeviceType::Cpu) {}

CallMemory::~CallMemory() {
  if (!finished_) {
    try {
      settle();
    } catch (...) {  // that which ended the call is on its way: this one waits for the next call
      context_.keep_error(std::current_exception());
    }
  }
  for (const Block& block : blocks_) backend_.deallocate(block.memory, block.bytes);
}

void CallMemory::settle() {
  if (blocks_.empty()) {
    backend_.submit(context_);
  } else {
    backend_.synchronize(context_);
  }
}

void CallMemory::finish() {
  finished_ = true;
  settle();
  context_.throw_kept_error();
}

std::byte* CallMemory::take(std::size_t bytes) { return allocate(bytes, "scratch memory"); }

float* CallMemory::take_floats(std::int64_t count) {
  return reinterpret_cast<float*>(take(static_cast<std::size_t>(count) * sizeof(float)));
}

std::byte* CallMemory::allocate(std::size_t bytes, const char* what) {
  if (bytes == 0) return nullptr;
  require_no_capture(operation_, context_, what);
  blocks_.reserve(blocks_.size() + 1);
  void* const memory = backend_.allocate(bytes);
  blocks_.push_back({memory, bytes});
  return static_cast<std::byte*>(memory);
}

std::vector<const std::byte*> CallMemory::upload(std::initializer_list<Bytes> arrays) {
  std::size_t total = 0;
  for (const Bytes& array : arrays) total += aligned(array.size());
  std::byte* at = allocate(total, "arrays in host memory");
  std::vector<const std::byte*> uploaded;
  for (const Bytes& array : arrays) {
    uploaded.push_back(array.empty() ? nullptr : at);
    if (array.empty()) continue;
    backend_.copy_on_stream(context_, at, array.data(), array.size());
    at += aligned(array.size());
  }
  return uploaded;
}

const std::int32_t* CallMemory::on_device(std::span<const std::int32_t> ids) {
  if (reads_host_) return ids.data();
  return ids_at(upload({std::as_bytes(ids)})[0]);
}

RoutingView CallMemory::on_device(const Routing& routing) {
  // The backend only reads it; its view type serves both directions.
  auto* ids = const_cast<std::int32_t*>(routing.topk_ids().data());
  auto* weights = const_cast<float*>(routing.topk_weights().data());
  if (!reads_host_) {
    const auto uploaded =
        upload({std::as_bytes(routing.topk_ids()), std::as_bytes(routing.topk_weights())});
    ids = const_cast<std::int32_t*>(ids_at(uploaded[0]));
    weights = reinterpret_cast<float*>(const_cast<std::byte*>(uploaded[1]));
  }
  return {ids, weights, routing.num_tokens(), routing.top_k()};
}

RowMap CallMemory::on_device(const RowMap& map, std::int64_t entries) {
  if (reads_host_) return map;
  const std::int64_t segments = map.num_segments;
  const auto uploaded = upload({bytes_of(map.expert, segments), bytes_of(map.offsets, segments + 1),
                                bytes_of(map.source, entries), bytes_of(map.destination, entries)});
  RowMap there = map;
  there.expert = ids_at(uploaded[0]);
  there.offsets = ids_at(uploaded[1]);
  there.source = ids_at(uploaded[2]);
  there.destination = ids_at(uploaded[3]);
  return there;
}

}  // namespace moesaic::ops
