#pragma once

/// What every kernel file begins with. The host emulator and the address-space check bring their
/// own versions of the three macros below: C++ has neither threadgroup variables nor function
/// constants.

#include <metal_stdlib>

#include "../arguments.h"

using namespace metal;
using namespace moesaic::metal_args;

/// Declares an array in threadgroup memory: THREADGROUP_ARRAY(float, tile, [32][33]);
#ifndef THREADGROUP_ARRAY
#define THREADGROUP_ARRAY(T, name, ...) threadgroup T name __VA_ARGS__
#endif

/// Declares a function constant at file scope, once for all kernels: FUNCTION_CONSTANT(int,
/// input_type, kConstantInput);
#ifndef FUNCTION_CONSTANT
#define FUNCTION_CONSTANT(T, name, index) constant T name [[function_constant(index)]]
#endif

/// The last parameters of every kernel: the position of its threadgroup in the grid, its simdgroup
/// in the threadgroup and its lane in the simdgroup. Threadgroups are one-dimensional.
#ifndef THREAD_POSITION
#define THREAD_POSITION                            \
  uint3 position [[threadgroup_position_in_grid]], \
      uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]
#endif

FUNCTION_CONSTANT(int, input_type, kConstantInput);
FUNCTION_CONSTANT(int, output_type, kConstantOutput);
FUNCTION_CONSTANT(int, activation_kind, kConstantActivation);
FUNCTION_CONSTANT(int, tile_cols, kConstantTile);
