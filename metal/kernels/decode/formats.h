#pragma once

/// Every format of the expert kernels: EXPERT_FORMATS(F) expands to F(suffix, decoder) for each.

#include "bf16.h"
#include "f16.h"
#include "f32.h"
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

#define EXPERT_FORMATS(F) \
  F(q2_k, DecodeQ2K)      \
  F(q3_k, DecodeQ3K)      \
  F(q4_k, DecodeQ4K)      \
  F(q5_k, DecodeQ5K)      \
  F(q6_k, DecodeQ6K)      \
  F(q8_0, DecodeQ80)      \
  F(q4_0, DecodeQ40)      \
  F(q4_1, DecodeQ41)      \
  F(q5_0, DecodeQ50)      \
  F(q5_1, DecodeQ51)      \
  F(iq4_nl, DecodeIQ4NL)  \
  F(iq4_xs, DecodeIQ4XS)  \
  F(mxfp4, DecodeMxfp4)   \
  F(nvfp4, DecodeNvfp4)   \
  F(f16, DecodeF16)       \
  F(bf16, DecodeBF16)     \
  F(f32, DecodeF32)
