#include "cpu/kernels/amx/tiles.hpp"
#include "cpu/kernels/avx512vnni/simd.hpp"
#include "cpu/kernels/tile_table.hpp"

namespace moesaic::cpu::amx {

constinit const TileKernels kTiles = make_tile_kernels();

}  // namespace moesaic::cpu::amx
