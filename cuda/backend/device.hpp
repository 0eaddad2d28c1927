#pragma once

/// One GPU behind the plug-in's table: errors as exceptions, the caller's current device kept.

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>

#include "cuda/plugin.h"
#include "moesaic/types.hpp"

namespace moesaic::cuda {

class Gpu {
 public:
  Gpu(const Table& table, int index) : table_(&table), index_(index) {}

  const Table& table() const { return *table_; }
  Device device() const { return {DeviceType::Cuda, index_}; }
  DeviceProperties properties() const;

  /// Throws OutOfMemoryError. 256-byte aligned; null for no bytes.
  void* allocate(std::size_t bytes) const;
  void deallocate(void* memory) const noexcept;
  /// From host memory to an allocation that nothing reads yet; complete when it returns. Leaves
  /// alone what other threads do on the device, recordings of graphs included.
  void upload(void* to, const void* from, std::size_t bytes) const;
  /// Between any of host and device, behind what the default stream waits for; complete when it
  /// returns.
  void copy(void* to, const void* from, std::size_t bytes) const;
  /// Ordered on the stream; host memory must then be left alone until it is reached.
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) const;
  void synchronize(Stream stream) const;
  bool capturing(Stream stream) const;
  /// Loads the kernels that products with this weight can run, so that a graph may record their
  /// first launch.
  void load_products(const WeightRef& weight) const;

  /// Calls `launch(args, stream)` of the table. Throws DeviceError, or UnsupportedError where no
  /// kernel fits.
  template <class Args>
  void run(const char* operation, int32_t (*launch)(const Args*, Stream), const Args& args,
           Stream stream) const {
    const Current current(*this);
    check(operation, launch(&args, stream));
  }

 private:
  /// This GPU as the thread's current device while alive. No other GPU gets a context by it: one
  /// takes hundreds of MB.
  class Current {
   public:
    explicit Current(const Gpu& gpu);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Gpu& gpu_;
    void* previous_ = nullptr;
  };
  void check(const char* operation, std::int32_t error) const;
  /// Loads the kernels of all operations but products, once.
  void load_operations() const;

  const Table* table_;
  int index_;
  mutable std::atomic<bool> operations_loaded_ = false;
};

}  // namespace moesaic::cuda
