#pragma once

/// make_kernels() fills an IsaKernels with everything that the including file compiles, that is one
/// instruction set. Include after simd.hpp.

#include "cpu/kernels/activate.hpp"
#include "cpu/kernels/decode_block32.hpp"
#include "cpu/kernels/decode_grid.hpp"
#include "cpu/kernels/decode_k.hpp"
#include "cpu/kernels/decode_ternary.hpp"
#include "cpu/kernels/gemm_float.hpp"
#include "cpu/kernels/gemm_int.hpp"
#include "cpu/kernels/gemm_scaled.hpp"
#include "cpu/kernels/quantize.hpp"

namespace moesaic::cpu {
namespace {

template <class D>
concept ScaledDecoder = requires { D::kScaleCols; };

template <class D>
constexpr PanelKernel gemm_of() {
  if constexpr (IntegerDecoder<D>) {
    return &gemm_int<D>;
  } else if constexpr (ScaledDecoder<D>) {
    return &gemm_scaled<D>;
  } else {
    return &gemm_float<D>;
  }
}

constexpr IsaKernels make_kernels() {
  IsaKernels k;
  ProductKernels& products = k.vectors;
  for (int p = 0; p < 3; ++p) products.bundle_tokens[p] = kMaxBundle[p];
#define MOESAIC_KERNEL(TYPE, NAME) \
  products.gemm[static_cast<int>(QuantType::TYPE)] = gemm_of<NAME>();
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
  products.gemm[static_cast<int>(QuantType::INT4)] = &gemm_int4;
  products.quantize = &quantize<Order::Broadcast>;
  products.copy_token = &copy_token<Order::Broadcast>;
  add_activations(k.activate, std::make_integer_sequence<int, kNumActivations>());
  return k;
}

}  // namespace
}  // namespace moesaic::cpu
