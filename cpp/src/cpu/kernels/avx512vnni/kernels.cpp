#include "cpu/kernels/avx512vnni/simd.hpp"
#include "cpu/kernels/table.hpp"

namespace moesaic::cpu::avx512vnni {

constinit const IsaKernels kKernels = make_kernels();

}  // namespace moesaic::cpu::avx512vnni
