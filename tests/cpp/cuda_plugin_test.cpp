// From a plug-in's table to backends, or to the reason why there is none. No kernels take part.

#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "backend/builtin.hpp"
#include "cuda/backend/cuda_backend.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

/// A table of two devices, the first too old.
struct HostTable : cuda::Table {
  static inline std::int32_t count_error = 0;
  static inline std::int32_t devices = 2;
  static inline void* current = nullptr;  ///< context; there is one for each device
  static inline std::array<bool, 2> contexts{};
  static inline std::int32_t launch_error = cuda::kOk;

  HostTable() : cuda::Table{} {
    version = cuda::kPluginVersion;
    table_bytes = sizeof(cuda::Table);
    build = "CUDA 13.0, sm_80";
    error_text = [](std::int32_t) { return "driver too old"; };
    device_count = [](std::int32_t* count) {
      *count = devices;
      return count_error;
    };
    device_properties = [](std::int32_t device, cuda::DeviceProperties* properties) {
      *properties = {};
      std::strcpy(properties->name, device == 0 ? "Old" : "New");
      properties->arch = device == 0 ? 75 : 90;
      properties->num_sms = 132;
      properties->memory_bytes = std::int64_t{80} << 30;
      properties->driver_version = 13000;
      return cuda::kOk;
    };
    is_sticky = [](std::int32_t error) { return error == 700; };
    enter_device = [](std::int32_t device, void** previous) {
      auto& context = contexts[static_cast<std::size_t>(device)];
      context = true;
      *previous = std::exchange(current, &context);
      return cuda::kOk;
    };
    leave_device = [](void* previous) {
      current = previous;
      return cuda::kOk;
    };
    load_operations = [] { return cuda::kOk; };
    allocate = [](std::int64_t bytes, void** memory) {
      *memory = std::malloc(static_cast<std::size_t>(bytes));
      return cuda::kOk;
    };
    deallocate = [](void* memory) {
      std::free(memory);
      return cuda::kOk;
    };
    fill = [](const op::Fill*, cuda::Stream) { return launch_error; };
  }
};

TEST(CudaPlugin, OneBackendForEachUsableDevice) {
  const HostTable table;
  const auto list = cuda::backends_of(table);
  ASSERT_EQ(list.size(), 1U);
  const BackendInfo info = list[0]->info();
  EXPECT_TRUE(info.available);
  EXPECT_EQ(info.name, "cuda");
  ASSERT_EQ(info.devices.size(), 1U);
  EXPECT_EQ(info.devices[0], (Device{DeviceType::Cuda, 1}));
  EXPECT_EQ(list[0]->device(), info.devices[0]);
  EXPECT_EQ(info.detail,
            "New, sm_90, 132 SMs, 81920 MiB; driver CUDA 13.0, plug-in CUDA 13.0, sm_80");
  EXPECT_FALSE(HostTable::contexts[0] || HostTable::contexts[1]) << "to look at it needs none";
}

TEST(CudaPlugin, OnlyTheBackendsDeviceGetsAContext) {
  const HostTable table;
  const auto backend = cuda::backends_of(table)[0];
  for (void* const callers :
       {static_cast<void*>(nullptr), static_cast<void*>(&HostTable::current)}) {
    HostTable::current = callers;
    backend->deallocate(backend->allocate(16), 16);
    EXPECT_EQ(HostTable::current, callers);
  }
  EXPECT_FALSE(HostTable::contexts[0]);
  EXPECT_TRUE(HostTable::contexts[1]);
}

std::string launch_failure(const Backend& backend, std::int32_t error) {
  HostTable::launch_error = error;
  Context context(backend, Tuning{}, ThreadPool::shared(1));
  std::string text = "none";
  try {
    backend.fill(context, {});
  } catch (const DeviceError& thrown) {
    text = thrown.what();
  }
  HostTable::launch_error = cuda::kOk;
  return text;
}

TEST(CudaPlugin, ALostContextIsSaid) {
  const HostTable table;
  const auto backend = cuda::backends_of(table)[0];
  EXPECT_NE(launch_failure(*backend, 700).find("start a new one"), std::string::npos);
  EXPECT_EQ(launch_failure(*backend, 1).find("start a new one"), std::string::npos);
  EXPECT_EQ(launch_failure(*backend, cuda::kOk), "none");
}

std::string reason_of(const cuda::Table& table) {
  const auto list = cuda::backends_of(table);
  EXPECT_EQ(list.size(), 1U);
  EXPECT_FALSE(list[0]->info().available);
  return list[0]->info().reason;
}

TEST(CudaPlugin, OtherVersionsAreRefused) {
  HostTable table;
  table.version = cuda::kPluginVersion + 1;
  EXPECT_NE(reason_of(table).find("interface version"), std::string::npos);
  table.version = cuda::kPluginVersion;
  table.table_bytes -= 8;
  EXPECT_NE(reason_of(table).find("interface version"), std::string::npos);
}

TEST(CudaPlugin, NoUsableDeviceIsAReason) {
  const HostTable table;
  HostTable::count_error = 35;
  EXPECT_EQ(reason_of(table), "no usable CUDA device: driver too old");
  HostTable::count_error = 0;
  HostTable::devices = 0;
  EXPECT_EQ(reason_of(table), "no CUDA device");
  HostTable::devices = 1;
  EXPECT_EQ(reason_of(table), "cuda:0, Old, is sm_75: the kernels need sm_80 or later");
  HostTable::devices = 2;
}

TEST(CudaPlugin, WithoutADriverTheReasonSaysSo) {
  const auto list = cuda_backends();
  ASSERT_FALSE(list.empty());
  if (list[0]->info().available) GTEST_SKIP() << "this machine has a GPU";
  const std::string reason = list[0]->info().reason;
  EXPECT_TRUE(reason.find("libcuda.so.1") != std::string::npos ||
              reason.find("plug-in") != std::string::npos ||
              reason.find("no usable CUDA device") != std::string::npos)
      << reason;
  EXPECT_THROW(list[0]->allocate(1), DeviceError);
}

}  // namespace
}  // namespace moesaic
