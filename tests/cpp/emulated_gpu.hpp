#pragma once

/// The host half of a CUDA device for the emulator: memory that it knows piece by piece, guarded
/// and poisoned; one stream order; captures that record launches and replay them. With the emulated
/// launchers it is the table of a plug-in. What a GPU would refuse is an error here: a host pointer
/// in a launch; an allocation, a wait or a copy to the host during a capture, a first load of a kernel
/// in a graph.

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/backend/cuda_backend.hpp"
#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "emulated_pointers.hpp"

namespace moesaic::testing {

class EmulatedGpu {
 public:
  /// One per process, as the table's functions carry no state.
  static EmulatedGpu& get() {
    static EmulatedGpu& gpu = *new EmulatedGpu;
    return gpu;
  }
  const cuda::Table& table() const { return table_; }
  std::shared_ptr<const cuda::CudaBackend> make_backend() const {
    return std::make_shared<const cuda::CudaBackend>(table_, 0);
  }

  struct Counts {
    int allocations = 0, copies = 0, waits = 0, launches = 0;
    bool operator==(const Counts&) const = default;
  };
  Counts counts;
  std::string refused;  ///< the last thing that a GPU would have refused
  int device_count = 1;
  std::int32_t arch = 90;
  /// The context of this device is current, and those of these exist; -1 for none.
  std::int32_t current_context = -1;
  std::set<std::int32_t> contexts;
  std::int64_t memory_limit = std::int64_t{1} << 40;

  std::int64_t live_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& [begin, piece] : pieces_) bytes += static_cast<std::int64_t>(piece.bytes);
    return bytes;
  }
  bool guards_untouched() const {
    for (const auto& [begin, piece] : pieces_) {
      if (!guarded(begin, piece)) return false;
    }
    return true;
  }

  /// A stream that records; launches run at replay(). The thread that begins may then do little
  /// else, other threads what leaves recordings alone.
  static cuda::Stream capture_stream() { return reinterpret_cast<cuda::Stream>(0x5); }
  void begin_capture() {
    capturing_ = true;
    recorder_ = std::this_thread::get_id();
    recorded_.clear();
  }
  std::vector<std::function<void()>> end_capture() {
    capturing_ = false;
    return std::exchange(recorded_, {});
  }

 private:
  static constexpr std::size_t kGuard = 256;
  static constexpr std::int32_t kCaptureError = 900;
  static constexpr std::int32_t kMemoryError = 2;
  static constexpr std::int32_t kInvalidError = 1;
  static constexpr std::int32_t kLaunchError = 719;
  static constexpr std::byte kGuardByte{0xA5};

  struct Piece {
    std::size_t bytes;
    std::byte* memory;  ///< with guards
  };

  EmulatedGpu() {
    cuda::fill_operations(table_);
    wrap_operations();
    table_.build = "emulated";
    table_.error_text = [](std::int32_t error) {
      return error == kMemoryError    ? "out of memory"
             : error == kCaptureError ? "not permitted while a stream is capturing"
             : error < 0              ? "no kernel for these arguments"
                                      : "invalid value";
    };
    table_.device_count = [](std::int32_t* count) {
      *count = get().device_count;
      return cuda::kOk;
    };
    table_.device_properties = [](std::int32_t, cuda::DeviceProperties* properties) {
      *properties = {};
      std::strcpy(properties->name, "Emulated GPU");
      properties->arch = get().arch;
      properties->num_sms = 4;
      properties->driver_version = 13000;
      return cuda::kOk;
    };
    table_.is_sticky = [](std::int32_t error) { return error == kLaunchError; };
    table_.enter_device = [](std::int32_t device, void** previous) {
      get().contexts.insert(device);
      *previous = to_context(std::exchange(get().current_context, device));
      return cuda::kOk;
    };
    table_.leave_device = [](void* previous) {
      get().current_context =
          static_cast<std::int32_t>(reinterpret_cast<std::intptr_t>(previous)) - 1;
      return cuda::kOk;
    };
    table_.upload = [](void* to, const void* from, std::int64_t bytes) {
      return get().upload(to, from, static_cast<std::size_t>(bytes));
    };
    table_.allocate = [](std::int64_t bytes, void** memory) {
      return get().allocate(static_cast<std::size_t>(bytes), memory);
    };
    table_.deallocate = [](void* memory) { return get().deallocate(memory); };
    table_.copy = [](void* to, const void* from, std::int64_t bytes, cuda::Stream stream) {
      return get().copy(to, from, static_cast<std::size_t>(bytes), stream);
    };
    table_.synchronize = [](cuda::Stream) {
      ++get().counts.waits;
      return get().capturing_ ? get().refuse(kCaptureError, "a wait during a capture") : cuda::kOk;
    };
    table_.is_capturing = [](cuda::Stream stream, std::int32_t* yes) {
      *yes = get().capturing_ && stream == capture_stream() ? 1 : 0;
      return cuda::kOk;
    };
  }

  std::int32_t refuse(std::int32_t error, std::string what) {
    refused = std::move(what);
    return error;
  }

  std::int32_t allocate(std::size_t bytes, void** memory) {
    ++counts.allocations;
    if (recording_here()) return refuse(kCaptureError, "an allocation during a capture");
    if (live_bytes() + static_cast<std::int64_t>(bytes) > memory_limit) return kMemoryError;
    const std::size_t whole = (bytes + 2 * kGuard + 255) / 256 * 256;
    auto* const base = static_cast<std::byte*>(std::aligned_alloc(256, whole));
    std::fill_n(base, whole, kGuardByte);
    std::memset(base + kGuard, 0xFF, bytes);
    pieces_[base + kGuard] = {bytes, base};
    *memory = base + kGuard;
    return cuda::kOk;
  }
  std::int32_t deallocate(void* memory) {
    const auto piece = pieces_.find(static_cast<std::byte*>(memory));
    if (piece == pieces_.end()) return refuse(kInvalidError, "freeing what was not allocated");
    if (!guarded(piece->first, piece->second)) refuse(kInvalidError, "a write outside an array");
    std::free(piece->second.memory);
    pieces_.erase(piece);
    return cuda::kOk;
  }
  std::int32_t upload(void* to, const void* from, std::size_t bytes) {
    ++counts.copies;
    if (recording_here()) return refuse(kCaptureError, "an upload during a capture");
    if (!on_device(to)) return refuse(kInvalidError, "an upload to host memory");
    std::memcpy(to, from, bytes);
    return cuda::kOk;
  }
  std::int32_t copy(void* to, const void* from, std::size_t bytes, cuda::Stream stream) {
    ++counts.copies;
    if (capturing_ && stream == nullptr) {
      recorded_.clear();  // of whichever thread
      return refuse(kCaptureError, "a copy on the default stream during a capture");
    }
    if (!capturing_) {
      std::memmove(to, from, bytes);
      return cuda::kOk;
    }
    if (!on_device(to) || !on_device(from)) {
      return refuse(kCaptureError, "a copy from or to the host during a capture");
    }
    recorded_.push_back([=] { std::memmove(to, from, bytes); });
    return cuda::kOk;
  }

  bool recording_here() const { return capturing_ && recorder_ == std::this_thread::get_id(); }
  static void* to_context(std::int32_t device) {
    return reinterpret_cast<void*>(static_cast<std::intptr_t>(device) + 1);
  }

  bool on_device(const void* address) const {
    const auto* const at = static_cast<const std::byte*>(address);
    auto piece = pieces_.upper_bound(const_cast<std::byte*>(at));
    if (piece == pieces_.begin()) return false;
    --piece;
    return at < piece->first + std::max<std::size_t>(piece->second.bytes, 1);
  }
  static bool guarded(const std::byte* begin, const Piece& piece) {
    const auto is_guard = [](std::byte b) { return b == kGuardByte; };
    return std::all_of(begin - kGuard, begin, is_guard) &&
           std::all_of(begin + piece.bytes, begin + piece.bytes + kGuard, is_guard);
  }

  /// The launcher behind a wrapped operation.
  template <auto Member>
  static inline std::remove_reference_t<decltype(std::declval<cuda::Table>().*Member)> launcher{};

  template <auto Member, class Args>
  static std::int32_t run(const Args* args, cuda::Stream) {
    EmulatedGpu& gpu = get();
    ++gpu.counts.launches;
    bool known = true;
    each_pointer(*args, [&](const void* p) { known &= p == nullptr || gpu.on_device(p); });
    if (!known) return gpu.refuse(kInvalidError, "a host address in a launch");
    if (gpu.capturing_) {
      gpu.recorded_.push_back([copy = *args] {
        const emulation::LoadedOnly as_a_graph;
        launcher<Member>(&copy, nullptr);
      });
      return cuda::kOk;
    }
    return launcher<Member>(args, nullptr);
  }
  template <auto Member, class Args>
  void wrap(std::int32_t (*)(const Args*, cuda::Stream)) {
    launcher<Member> = std::exchange(table_.*Member, &run<Member, Args>);
  }
  template <auto... Members>
  void wrap_all() {
    (wrap<Members>(table_.*Members), ...);
  }
  void wrap_operations() {
    using T = cuda::Table;
    wrap_all<&T::router_logits, &T::route, &T::look_up_experts, &T::shared_routing, &T::bucket_plan,
             &T::align, &T::gather, &T::activate, &T::combine, &T::rms_norm, &T::add_identity,
             &T::zero_skipped, &T::fill, &T::gemm, &T::gate_up, &T::down>();
  }

  cuda::Table table_{};
  std::map<std::byte*, Piece> pieces_;
  bool capturing_ = false;
  std::thread::id recorder_;
  std::vector<std::function<void()>> recorded_;
};

}  // namespace moesaic::testing
