/// The machine's limits, for the bench. Not re-exported by moesaic.

#include "moesaic/measure.hpp"

#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.hpp"
#include "gil.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::python {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{512} << 20;
constexpr std::align_val_t kHugePage{std::size_t{2} << 20};

struct Free {
  void operator()(std::byte* memory) const { ::operator delete(memory, kHugePage); }
};

double bandwidth(int threads) {
  const InterruptibleRelease release;
  const std::unique_ptr<std::byte, Free> buffer(
      static_cast<std::byte*>(::operator new(kBufferBytes, kHugePage)));
#if defined(__linux__)
  madvise(buffer.get(), kBufferBytes, MADV_HUGEPAGE);
#endif
  std::memset(buffer.get(), 1, kBufferBytes);  // pages that were never written are not memory
  return 1e-9 * measure_bandwidth(*ThreadPool::shared(threads), buffer.get(), kBufferBytes);
}

double dot_peak(int threads) {
  const InterruptibleRelease release;
  return 1e-9 * measure_dot_peak(*ThreadPool::shared(threads));
}

}  // namespace

void bind_measure(py::module_& m) {
  m.def("measure_bandwidth", &bandwidth, py::arg("threads") = 0);
  m.def("measure_dot_peak", &dot_peak, py::arg("threads") = 0);
}

}  // namespace moesaic::python
