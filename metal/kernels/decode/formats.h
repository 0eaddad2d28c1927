#pragma once

/// Every format of the expert kernels: EXPERT_FORMATS(F) expands to F(suffix, decoder) for each.

#include "floats.h"
#include "int4.h"
#include "iq1.h"
#include "iq2.h"
#include "iq3.h"
#include "iq4.h"
#include "mxfp4.h"
#include "nvfp4.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_0.h"
#include "q4_1.h"
#include "q4_k.h"
#include "q5.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"
#include "ternary.h"

#define EXPERT_FORMATS(F)       \
  F(q2_k, DecodeQ2K)            \
  F(q3_k, DecodeQ3K)            \
  F(q4_k, DecodeQ4K)            \
  F(q5_k, DecodeQ5K)            \
  F(q6_k, DecodeQ6K)            \
  F(q8_0, DecodeQ80)            \
  F(q4_0, DecodeQ40)            \
  F(q4_1, DecodeQ41)            \
  F(q5_0, DecodeQ50)            \
  F(q5_1, DecodeQ51)            \
  F(iq1_s, DecodeIQ1S)          \
  F(iq1_m, DecodeIQ1M)          \
  F(iq2_xxs, DecodeIQ2XXS)      \
  F(iq2_xs, DecodeIQ2XS)        \
  F(iq2_s, DecodeIQ2S)          \
  F(iq3_xxs, DecodeIQ3XXS)      \
  F(iq3_s, DecodeIQ3S)          \
  F(iq4_nl, DecodeIQ4NL)        \
  F(iq4_xs, DecodeIQ4XS)        \
  F(tq1_0, DecodeTQ10)          \
  F(tq2_0, DecodeTQ20)          \
  F(q1_0, DecodeQ10)            \
  F(q2_0, DecodeQ20)            \
  F(mxfp4, DecodeMxfp4)         \
  F(nvfp4, DecodeNvfp4)         \
  F(int4, DecodeInt4)           \
  F(f16, DecodeFloats<half>)    \
  F(bf16, DecodeFloats<ushort>) \
  F(f32, DecodeFloats<float>)
