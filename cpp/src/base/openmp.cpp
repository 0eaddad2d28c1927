#include "base/openmp.hpp"

#include <dlfcn.h>

#include <atomic>

#include "base/fork.hpp"

namespace moesaic {
namespace {

std::atomic<const OpenMpRuntime*> lender{nullptr};

struct ForgetLender final : ForkHook {
  ForgetLender() { watch(); }
  void forked() noexcept override { lender.store(nullptr); }
};

template <class Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(::dlsym(library, name));
  return function != nullptr;
}

}  // namespace

bool lend_openmp(const char* library) {
  // Kept open: threads of the runtime may be in it at any time.
  void* const handle = ::dlopen(library, RTLD_NOLOAD | RTLD_LAZY | RTLD_LOCAL);
  if (handle == nullptr) return false;
  OpenMpRuntime found{};
  if (!find(handle, "GOMP_parallel", found.parallel) ||
      !find(handle, "omp_get_thread_num", found.thread_num) ||
      !find(handle, "omp_get_max_threads", found.max_threads) ||
      !find(handle, "omp_in_parallel", found.in_parallel)) {
    ::dlclose(handle);
    return false;
  }
  // Neither is ever destroyed: workers may outlive static destructors.
  static ForgetLender& forget = *new ForgetLender;
  static_cast<void>(forget);
  lender.store(new OpenMpRuntime(found), std::memory_order_release);
  return true;
}

const OpenMpRuntime* openmp_lender() noexcept { return lender.load(std::memory_order_acquire); }

}  // namespace moesaic
