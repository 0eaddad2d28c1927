#pragma once

/// Every format of the expert kernels: EXPERT_FORMATS(F) expands to F(suffix, decoder) for each.

#include "f16.h"
#include "mxfp4.h"
#include "q4_0.h"
#include "q4_k.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"

#define EXPERT_FORMATS(F) \
  F(q4_k, DecodeQ4K)      \
  F(q5_k, DecodeQ5K)      \
  F(q6_k, DecodeQ6K)      \
  F(q8_0, DecodeQ80)      \
  F(q4_0, DecodeQ40)      \
  F(mxfp4, DecodeMxfp4)   \
  F(f16, DecodeF16)
