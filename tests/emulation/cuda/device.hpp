// The host side of cuda/device.cuh: the same names, run by the emulator.
#pragma once

#include "cuda/copies.hpp"
#include "cuda/float16.hpp"
#include "cuda/intrinsics.hpp"
#include "cuda/launch.hpp"
#include "cuda/tensor_core.hpp"
#include "cuda/warp.hpp"
