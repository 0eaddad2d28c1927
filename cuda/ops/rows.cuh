// Elements of f32, f16 and bf16 rows as f32, one or four (a quad) at a time. Rows promise no
// alignment, so quads are taken only where quads_allowed() says so.
#pragma once

#include "device.cuh"
#include "plugin.h"

namespace moesaic::cuda {

template <DType kType>
struct Element {
  using Bits = uint16_t;
};
template <>
struct Element<DType::F32> {
  using Bits = float;
};

template <DType kType>
MOESAIC_DEV float load_element(const void* data, int64_t at) {
  const auto bits = static_cast<const typename Element<kType>::Bits*>(data)[at];
  if constexpr (kType == DType::F32) {
    return bits;
  } else if constexpr (kType == DType::F16) {
    return dev::f16_to_f32(bits);
  } else {
    return dev::bf16_to_f32(bits);
  }
}

template <DType kType>
MOESAIC_DEV void store_element(void* data, int64_t at, float value) {
  auto& bits = static_cast<typename Element<kType>::Bits*>(data)[at];
  if constexpr (kType == DType::F32) {
    bits = value;
  } else if constexpr (kType == DType::F16) {
    bits = dev::f32_to_f16(value);
  } else {
    bits = dev::f32_to_bf16(value);
  }
}

struct Quad {
  float v[4];
};

// Whether quads of a row that starts here are aligned; columns must be a multiple of 4 besides.
template <DType kType>
MOESAIC_DEV bool quads_allowed(const void* data, int64_t offset) {
  const auto* const first = static_cast<const typename Element<kType>::Bits*>(data) + offset;
  return reinterpret_cast<uintptr_t>(first) % (4 * sizeof(*first)) == 0;
}

template <DType kType>
MOESAIC_DEV Quad load_quad(const void* data, int64_t at) {
  if constexpr (kType == DType::F32) {
    const float4 q = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
    return {{q.x, q.y, q.z, q.w}};
  } else {
    const uint2 q = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + at);
    const float2 low = kType == DType::F16 ? dev::unpack_f16(q.x) : dev::unpack_bf16(q.x);
    const float2 high = kType == DType::F16 ? dev::unpack_f16(q.y) : dev::unpack_bf16(q.y);
    return {{low.x, low.y, high.x, high.y}};
  }
}

template <DType kType>
MOESAIC_DEV void store_quad(void* data, int64_t at, const Quad& q) {
  if constexpr (kType == DType::F32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + at) =
        make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + at) =
        kType == DType::F16
            ? make_uint2(dev::pack_f16(q.v[0], q.v[1]), dev::pack_f16(q.v[2], q.v[3]))
            : make_uint2(dev::pack_bf16(q.v[0], q.v[1]), dev::pack_bf16(q.v[2], q.v[3]));
  }
}

// Columns [4 * quad, 4 * quad + 4) of a row of `cols`; those behind the end are 0.
template <DType kType>
MOESAIC_DEV Quad load_columns(const void* data, int64_t offset, int64_t quad, int64_t cols,
                              bool whole) {
  if (whole) return load_quad<kType>(data, offset + 4 * quad);
  Quad q;
  MOESAIC_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t col = 4 * quad + i;
    q.v[i] = col < cols ? load_element<kType>(data, offset + col) : 0.0F;
  }
  return q;
}

template <DType kType>
MOESAIC_DEV void store_columns(void* data, int64_t offset, int64_t quad, int64_t cols, bool whole,
                               const Quad& q) {
  if (whole) {
    store_quad<kType>(data, offset + 4 * quad, q);
    return;
  }
  MOESAIC_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t col = 4 * quad + i;
    if (col < cols) store_element<kType>(data, offset + col, q.v[i]);
  }
}

// Calls run<type>() with the element type as a constant; kUnsupported for others.
template <class Run>
int32_t for_element_type(DType type, const Run& run) {
  switch (type) {
    case DType::F32:
      return run.template operator()<DType::F32>();
    case DType::F16:
      return run.template operator()<DType::F16>();
    case DType::BF16:
      return run.template operator()<DType::BF16>();
    default:
      return kUnsupported;
  }
}

}  // namespace moesaic::cuda
