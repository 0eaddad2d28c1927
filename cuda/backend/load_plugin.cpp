/// From the driver and the plug-in to one backend per GPU, or to the reason why there is none.

#include <filesystem>
#include <string>
#include <variant>

#include "backend/builtin.hpp"
#include "cuda/backend/cuda_backend.hpp"
#include "moesaic/error.hpp"
#include "moesaic/tuning.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace moesaic {
namespace {

using Backends = std::vector<std::shared_ptr<const Backend>>;

constexpr std::int32_t kMinArch = 80;

#if defined(__linux__)

constexpr const char* kPluginName = "libmoesaic_cuda.so";

/// Beside the shared object or program that holds this library.
std::filesystem::path plugin_path() {
  const std::filesystem::path& given = Tuning::process().cuda_plugin;
  if (!given.empty()) return given;
  Dl_info info{};
  const auto* const here = reinterpret_cast<const void*>(&plugin_path);
  if (dladdr(here, &info) == 0 || info.dli_fname == nullptr) return kPluginName;
  return std::filesystem::path(info.dli_fname).parent_path() / kPluginName;
}

/// The table, or why there is none. Libraries stay loaded: their code outlives every context.
std::variant<const cuda::Table*, std::string> load_table() {
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr) {
    return std::string("no NVIDIA driver: ") + dlerror();
  }
  const std::filesystem::path path = plugin_path();
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) {
    return "no CUDA plug-in at " + path.string() +
           ": this build is without it (MOESAIC_CUDA=ON builds it)";
  }
  void* const plugin = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (plugin == nullptr) return std::string("the CUDA plug-in does not load: ") + dlerror();
  const auto entry =
      reinterpret_cast<decltype(&moesaic_cuda_plugin)>(dlsym(plugin, "moesaic_cuda_plugin"));
  if (entry == nullptr) return path.string() + " is not a CUDA plug-in of moesaic: " + dlerror();
  return entry();
}

#else

std::variant<const cuda::Table*, std::string> load_table() {
  return std::string("CUDA needs Linux");
}

#endif

Backends absent(std::string reason) {
  return {absent_backend(DeviceType::Cuda, "cuda", std::move(reason))};
}

}  // namespace

namespace cuda {

Backends backends_of(const Table& table) {
  if (table.version != kPluginVersion || table.table_bytes != sizeof(Table)) {
    return absent("the CUDA plug-in is of another build (interface version " +
                  std::to_string(table.version) + ", " + std::to_string(table.table_bytes) +
                  " bytes; this library needs " + std::to_string(kPluginVersion) + ", " +
                  std::to_string(sizeof(Table)) + "): install both from one build");
  }
  std::int32_t count = 0;
  if (const std::int32_t error = table.device_count(&count); error != kOk) {
    return absent(std::string("no usable CUDA device: ") + table.error_text(error));
  }
  Backends list;
  std::string reason = "no CUDA device";
  for (std::int32_t i = 0; i < count; ++i) {
    DeviceProperties properties{};
    if (const std::int32_t error = table.device_properties(i, &properties); error != kOk) {
      reason = "cuda:" + std::to_string(i) + ": " + table.error_text(error);
    } else if (properties.arch < kMinArch) {
      reason = "cuda:" + std::to_string(i) + ", " + properties.name + ", is sm_" +
               std::to_string(properties.arch) + ": the kernels need sm_" +
               std::to_string(kMinArch) + " or later";
    } else {
      list.push_back(std::make_shared<CudaBackend>(table, i));
    }
  }
  return list.empty() ? absent(std::move(reason)) : list;
}

}  // namespace cuda

Backends cuda_backends() {
  const auto loaded = load_table();
  if (const auto* const reason = std::get_if<std::string>(&loaded)) return absent(*reason);
  return cuda::backends_of(*std::get<const cuda::Table*>(loaded));
}

}  // namespace moesaic
