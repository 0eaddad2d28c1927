// A decoder is a kind of codes and a kind of scales, under the lower-case name of the format. The
// loops of gemm/ know no formats, only these members:
//
//   kUnitBytes              bytes of the codes of a unit
//   kPlanes                 bf16 fragments whose sum is the code (f16: 2, f32: 3, else 1)
//   kScaleGroups            scale groups of a unit (columns that share a scale): 1, 2, 4, or 0
//                           where codes are the weights; scale group j covers the k16 steps
//                           [4 j / kScaleGroups, 4 (j + 1) / kScaleGroups)
//   kLaneCols               columns that a lane has side by side (lane_cols)
//   kShift                  what fragments hold in excess of the code, the same number for all
//                           weights of the format
//   kOffset                 whether promotions have an offset
//   kMinima                 whether products of minima are subtracted, those of a unit at once
//   Codes                   what a lane holds of a unit
//   load_shared(unit, lane) reads Codes from shared memory
//   fragment<s, p>(codes, a)
//                           plane p of the A fragment of k16 step s
//   Scales                  the scales of a unit for rows g and g + 8, as they are stored
//   ScalePlace, scale_place(weight, row_block_scales, unit, g), load_scales(base, place)
//                           where Scales lie, and reads them, in kScaleLoads loads
//   Place, place(weight, row_block, unit, lane), step(place, weight)
//                           where a lane reads codes and scales of an expert, and the same
//                           kWalkUnits later
//   load(expert, place)     reads Codes from memory, where they are not kept in L1 afterwards
//   promotion(scales, j)    the Promotion of scale group j
//   minima(scales, a)       where there are some: A fragment of mma.m16n8k8, the minima of the two
//                           scale groups in each pair of columns; weights are less by
//                           minima_scale(scales) times them
#pragma once

#include "formats/codes.cuh"
#include "formats/scales.cuh"

namespace moesaic::cuda {

template <class C, class S>
struct Decoder : C, S {
  using typename C::Codes;
  static constexpr int kLaneCols = S::kScaleGroups == 4 ? 4 : 8;
  struct Place {
    typename C::CodePlace codes;
    typename S::ScalePlace scales;
  };
  static MOESAIC_DEV Place place(const PackedWeight& weight, int row_block, int unit, int lane) {
    const int64_t codes =
        row_block * weight.code_block_bytes + static_cast<int64_t>(unit) * C::kUnitBytes;
    const int64_t scales = weight.scales_at + row_block * weight.scale_block_bytes;
    return {C::code_place(offset_of(codes), lane),
            S::scale_place(weight, offset_of(scales), unit, lane / 4)};
  }
  static MOESAIC_DEV void step(Place& place, const PackedWeight& weight) {
    place.codes.step(kWalkUnits * C::kUnitBytes);
    place.scales.step(weight);
  }
  static MOESAIC_DEV Codes load(const uint8_t* expert, const Place& place) {
    return C::template load_from<FromGlobal>(expert, place.codes);
  }
  static MOESAIC_DEV Codes load_shared(const uint8_t* unit, int lane) {
    return C::template load_from<FromShared>(unit, C::code_place(0, lane));
  }
};

namespace decoders {

using Two = FieldCodes<2>;
using Three = FieldCodes<3>;
using Four = FieldCodes<4>;
using Five = FieldCodes<5>;
using Six = FieldCodes<6>;

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
// INT4 by columns of a scale group, type of its scale, and whether it has zero points.
using int4 = Decoder<Four, Int4Scale<1, Four::kBias, false, false>>;
using int4_zeros = Decoder<Four, Int4Scale<1, Four::kBias, false, true>>;
using int4_f32 = Decoder<Four, Int4Scale<1, Four::kBias, true, false>>;
using int4_f32_zeros = Decoder<Four, Int4Scale<1, Four::kBias, true, true>>;
using int4_g32 = Decoder<Four, Int4Scale<2, Four::kBias, false, false>>;
using int4_g32_zeros = Decoder<Four, Int4Scale<2, Four::kBias, false, true>>;
using int4_g32_f32 = Decoder<Four, Int4Scale<2, Four::kBias, true, false>>;
using int4_g32_f32_zeros = Decoder<Four, Int4Scale<2, Four::kBias, true, true>>;

#define MOESAIC_FORMAT(TYPE, value, name, unit_bytes, scale) \
  static_assert(name::kUnitBytes == unit_bytes && name::kLaneCols == lane_cols(value));
#include "formats.inc"
#undef MOESAIC_FORMAT

}  // namespace decoders
}  // namespace moesaic::cuda
