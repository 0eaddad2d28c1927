#include "cpu/kernels/avxvnni/simd.hpp"
#include "cpu/kernels/table.hpp"

namespace moesaic::cpu::avxvnni {

constinit const IsaKernels kKernels = make_kernels();

}  // namespace moesaic::cpu::avxvnni
