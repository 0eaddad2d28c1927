// The threads that route one token: a warp, or a block when the experts do not fit one warp's
// registers. Item `i * kThreads + rank` (an expert, or a group of experts) lives in register i of
// thread `rank`, so loads are coalesced and ids ascend with i.
#pragma once

#include "device.cuh"
#include "plugin.h"
#include "route/keys.cuh"

namespace moesaic::cuda {

template <int kWarps, int kPerLane>
struct TeamShared {
  static constexpr int kCapacity = 32 * kWarps * kPerLane;
  int32_t keys[kCapacity];  // of the experts while groups are ranked, then one flag per group
  int32_t ids[kMaxTopK];
  float weights[kMaxTopK];
  // Two sets of slots in turn: one barrier per exchange is enough.
  int32_t exchange_key[2][kWarps];
  int32_t exchange_id[2][kWarps];
};

template <int kWarps, int kPerLane>
struct Team {
  static constexpr int kThreads = 32 * kWarps;
  using Shared = TeamShared<kWarps, kPerLane>;

  int rank;
  Shared* shared;
  int turn = 0;

  MOESAIC_DEV Team(int thread, Shared* memory) : rank(thread % kThreads), shared(memory) {}

  MOESAIC_DEV int item(int i) const { return i * kThreads + rank; }

  MOESAIC_DEV void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Shows `mine` of every warp to the whole team, in warp order.
  MOESAIC_DEV const int32_t* exchange(int32_t mine) {
    int32_t* const slots = shared->exchange_key[turn ^= 1];
    if (rank % 32 == 0) slots[rank / 32] = mine;
    __syncthreads();
    return slots;
  }

  MOESAIC_DEV bool any(bool mine) {
    bool found = __any_sync(~0U, mine ? 1 : 0) != 0;
    if constexpr (kWarps > 1) {
      const int32_t* const warps = exchange(found ? 1 : 0);
      MOESAIC_UNROLL
      for (int w = 0; w < kWarps; ++w) found = found || warps[w] != 0;
    }
    return found;
  }

  MOESAIC_DEV float max(float mine) {
    for (int step = 16; step > 0; step /= 2) mine = fmaxf(mine, __shfl_xor_sync(~0U, mine, step));
    if constexpr (kWarps > 1) {
      const int32_t* const warps = exchange(__float_as_int(mine));
      MOESAIC_UNROLL
      for (int w = 0; w < kWarps; ++w) mine = fmaxf(mine, __int_as_float(warps[w]));
    }
    return mine;
  }

  // In a fixed order: a thread's items, then a tree over lanes, then the warps from left to right.
  MOESAIC_DEV float sum(float mine) {
    for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(~0U, mine, step);
    if constexpr (kWarps > 1) {
      const int32_t* const warps = exchange(__float_as_int(mine));
      mine = 0.0F;
      MOESAIC_UNROLL
      for (int w = 0; w < kWarps; ++w) mine += __int_as_float(warps[w]);
    }
    return mine;
  }

  // The item with the largest key, the lowest one of equals; its key becomes kPickedKey.
  MOESAIC_DEV int pick(int32_t (&keys)[kPerLane]) {
    int32_t key = keys[0];
    int id = item(0);
    MOESAIC_UNROLL
    for (int i = 1; i < kPerLane; ++i) {
      if (keys[i] > key) {
        key = keys[i];
        id = item(i);
      }
    }
    int32_t largest = __reduce_max_sync(~0U, key);
    int first = __reduce_min_sync(~0U, key == largest ? id : INT32_MAX);
    if constexpr (kWarps > 1) {
      int32_t* const ids = shared->exchange_id[turn ^ 1];
      if (rank % 32 == 0) ids[rank / 32] = first;
      const int32_t* const warps = exchange(largest);
      largest = warps[0];
      first = ids[0];
      MOESAIC_UNROLL
      for (int w = 1; w < kWarps; ++w) {
        if (warps[w] > largest || (warps[w] == largest && ids[w] < first)) {
          largest = warps[w];
          first = ids[w];
        }
      }
    }
    MOESAIC_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      if (item(i) == first) keys[i] = kPickedKey;
    }
    return first;
  }
};

}  // namespace moesaic::cuda
