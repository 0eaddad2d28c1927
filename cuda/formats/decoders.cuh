// A decoder is a kind of codes and a kind of scales, under the lower-case name of the format. The
// loops of gemm/ know no formats, only these members:
//
//   kUnitBytes              bytes of the codes of a unit
//   kPlanes                 bf16 fragments whose sum is the code (f16: 2, f32: 3, else 1)
//   kScaleGroups            scale groups of a unit (columns that share a scale): 1, 2, 4, or 0
//                           where codes are the weights; scale group j covers the k16 steps
//                           [4 j / kScaleGroups, 4 (j + 1) / kScaleGroups)
//   kOffset                 whether promotions have an offset, which wants sums of x by scale
//                           group
//   Codes                   what a lane holds of a unit
//   load(unit, lane)        reads Codes from memory, where they are not kept in L1 afterwards;
//                           load_shared reads them from shared memory
//   fragment<s, p>(codes, a)
//                           plane p of the A fragment of k16 step s
//   Scales                  the scales of a unit for rows g and g + 8, as they are stored
//   load_scales(weight, row_block_scales, unit, g)
//                           reads Scales
//   promotion(scales, j)    the Promotion of scale group j
#pragma once

#include "formats/codes.cuh"
#include "formats/scales.cuh"

namespace moesaic::cuda {

template <class C, class S>
struct Decoder : C, S {
  using typename C::Codes;
  static MOESAIC_DEV Codes load(const uint8_t* unit, int lane) {
    return C::template load_from<FromGlobal>(unit, lane);
  }
  static MOESAIC_DEV Codes load_shared(const uint8_t* unit, int lane) {
    return C::template load_from<FromShared>(unit, lane);
  }
};

namespace decoders {

using Two = BitFieldCodes<2, 0>;
using Three = BitFieldCodes<2, 1>;
using Four = BitFieldCodes<4, 0>;
using Five = BitFieldCodes<4, 1>;
using Six = BitFieldCodes<4, 2>;

using q4_0 = Decoder<Four, Scale32<Four::kBias + 8>>;
using q4_1 = Decoder<Four, ScaleMin32<Four::kBias>>;
using q5_0 = Decoder<Five, Scale32<Five::kBias + 16>>;
using q5_1 = Decoder<Five, ScaleMin32<Five::kBias>>;
using q2_k = Decoder<Two, SuperScaleMin16<Two::kBias>>;
using q3_k = Decoder<Three, SuperScale<kSuperScale16, false, 32, Three::kBias + 4>>;
using q4_k = Decoder<Four, SuperScaleMin32<Four::kBias>>;
using q5_k = Decoder<Five, SuperScaleMin32<Five::kBias>>;
using q6_k = Decoder<Six, SuperScale<kSuperScale16, true, 0, Six::kBias + 32>>;
using q8_0 = Decoder<ByteCodes, Scale32<0>>;
using iq4_nl = Decoder<BookCodes<Iq4Levels>, Scale32<0>>;
using iq4_xs = Decoder<BookCodes<Iq4Levels>, SuperScale<kSuperScale32, false, 32, 0>>;
using mxfp4 = Decoder<BookCodes<Fp4Doubled>, ByteScale<kByte32, HalfE8m0>>;
using nvfp4 = Decoder<BookCodes<Fp4Doubled>, ByteScale<kByte16, HalfUe4m3>>;
using f32 = Decoder<F32Codes, NoScale>;
using f16 = Decoder<F16Codes, NoScale>;
using bf16 = Decoder<Bf16Codes, NoScale>;
using int4 = Decoder<Four, Int4Scale<1, Four::kBias>>;
using int4_g32 = Decoder<Four, Int4Scale<2, Four::kBias>>;

#define MOESAIC_FORMAT(TYPE, value, name, unit_bytes, scale) \
  static_assert(name::kUnitBytes == unit_bytes);
#include "formats.inc"
#undef MOESAIC_FORMAT

}  // namespace decoders
}  // namespace moesaic::cuda
