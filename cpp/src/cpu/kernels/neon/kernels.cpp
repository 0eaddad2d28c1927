#include "cpu/kernels/neon/simd.hpp"
#include "cpu/kernels/table.hpp"

namespace moesaic::cpu::neon {

constinit const IsaKernels kKernels = make_kernels();

}  // namespace moesaic::cpu::neon
