#pragma once

/// The Metal backend for tests: over the fake runtime, or (MOESAIC_REAL_METAL) on the device of a Mac,
/// where there is one order of threads and nobody counts objects.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/builtin.hpp"
#include "device_array.hpp"
#include "layers.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

#ifdef MOESAIC_REAL_METAL

namespace moesaic::emulation {

struct Options {
  std::uint64_t seed = 0;
};
inline Options& options() {
  static Options values;
  return values;
}
inline std::vector<std::uint64_t> seeds() { return {0}; }

}  // namespace moesaic::emulation

#else

#include "fake_runtime/fake_metal.hpp"
#include "runtime/emulator.hpp"
#include "seeds.hpp"

#endif

namespace moesaic::testing {

/// A backend of its own per test; every object of the driver must be gone afterwards.
class MetalTest : public ::testing::Test {
 protected:
#ifdef MOESAIC_REAL_METAL
  MetalTest() = default;
  ~MetalTest() override = default;
#else
  MetalTest() {
    fake_metal::faults() = {};
    fake_metal::pace() = {};
    // The first use of a class makes an object that stays.
    metal::create_backend();
    backend_.reset();
    objects_ = fake_metal::live_objects();
    backend_ = metal::create_backend();
    fake_metal::counters() = {};
  }
  ~MetalTest() override {
    fake_metal::faults() = {};
    backend_.reset();
    EXPECT_EQ(fake_metal::live_objects(), objects_);
    emulation::options() = {};
  }
#endif

  const Backend& backend() const { return *backend_; }
  Context context(const Tuning& tuning = {}) const {
    return {*backend_, tuning, ThreadPool::shared(1)};
  }
  template <class T>
  DeviceArray<T> array(const std::vector<T>& values) const {
    return {*backend_, values};
  }
  template <class T>
  DeviceArray<T> poisoned(std::int64_t size) const {
    return {*backend_, size};
  }
  Device device() const { return backend_->device(); }

  std::shared_ptr<const Backend> backend_ = metal::create_backend();

 private:
  [[maybe_unused]] long objects_ = 0;
};

}  // namespace moesaic::testing
