#include "cpu/kernels/scalar/simd.hpp"
#include "cpu/kernels/table.hpp"

namespace moesaic::cpu::scalar {

constinit const IsaKernels kKernels = make_kernels();

}  // namespace moesaic::cpu::scalar
