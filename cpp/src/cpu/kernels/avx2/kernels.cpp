#include "cpu/kernels/avx2/simd.hpp"
#include "cpu/kernels/table.hpp"

namespace moesaic::cpu::avx2 {

constinit const IsaKernels kKernels = make_kernels();

}  // namespace moesaic::cpu::avx2
