// What a product kernel is given, whatever its loop.
#pragma once

#include "formats/packed.cuh"
#include "gemm/output.cuh"
#include "gemm/stage.cuh"
#include "gemm/tile.cuh"

namespace moesaic::cuda {

struct ProductArgs {
  PackedWeight weight;
  TileSource tiles;
  StagedRows x;
  OutputArgs out;
};

}  // namespace moesaic::cuda
