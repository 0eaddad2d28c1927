// The down products of a token and their weighted sum in one go, for a handful of tokens:
// out[t] (+)= sum over slots, in order, of weight * (W[expert] hidden[row] * scale + bias).
//
//   block = one token x one row block (16 rows of out); two groups of 8 warps
//
//            units of slot 0        units of slot 2        ..   group 0: even slots, group 1: odd
//            0   1  ..  7  ..  11   0   1  ..  7  ..  11        ones
//   rows    +---+---+--+---+--+---+---+---+--+---+--+---+
//   0 .. 15 |w0 |w1 |..|w7 |..|w3 |w4 |w5 |..|w3 |..|w7 |  ..   slots end to end are one long K,
//           +---+---+--+---+--+---+---+---+--+---+--+---+       dealt to the 8 warps in turn
//
//   parts   [slot][u % 8][16 rows]  ->  rows [slot][16]  ->  out [16]       in shared memory
//
// Units u, u + 8, .. of a slot always fall to one warp, so the parts of a slot are those of
// narrow.cuh, added in the same order; a row is rounded to the type of pair rows before it is
// weighted, and slots are added as ops/combine.cuh adds them. Bits are therefore those of the
// narrow product followed by combine, for each token by itself. Pairs that combine skips, and those
// of experts that are not resident, are neither read nor added.
//
// Bytes in flight. One token of 2048 columns, 768 hidden ones, top 8 and 4 bits reads 6.5 MB in
// 128 blocks, about one per multiprocessor: 96 units each, 6 for each of 16 warps. A multiprocessor
// must keep some 24 KiB on their way (4 TB/s for 0.7 us, over 132), so a warp keeps 1.5 KiB in
// flight, whatever the bytes of a unit, and their x where registers allow.
//
// Weight bytes: once per pair. Blocks of one row block and neighbouring tokens are neighbours in
// the grid, so that pairs that share an expert meet in L2.
//
// Preconditions: hidden rows staged (stage.cuh), weights packed alone (formats/layout.h), up to
// kMaxTopK slots, kDownSumThreads threads, grid = row blocks x tokens. Not measured on hardware.
#pragma once

#include "device.cuh"
#include "gemm/narrow.cuh"
#include "ops/pairs.cuh"

namespace moesaic::cuda {

// The race checker fails on blocks of more than 255 threads, so it builds with 1.
#ifndef MOESAIC_SLOT_GROUPS
#define MOESAIC_SLOT_GROUPS 2
#endif
inline constexpr int kSlotGroups = MOESAIC_SLOT_GROUPS;
inline constexpr int kDownSumThreads = 32 * kParts * kSlotGroups;

struct DownSumArgs {
  PackedWeight weight;
  StagedRows x;
  RoleOutput out;
  op::Combine combine;  // its rows are the hidden rows, as staged
};

template <class D, int kPlanes>
struct DownSum {
  using Product = WarpProduct<D, kPlanes, 1>;
  static constexpr int kDepth = (1536 + D::kUnitBytes - 1) / D::kUnitBytes;
  // Words of a lane with x ahead: of what is in flight, as many as there are registers for.
  static constexpr int kRingWords =
      kDepth * ((sizeof(typename D::Codes) + sizeof(typename D::Scales)) / 4 + 8 * kPlanes + 1);
  static constexpr bool kXAhead = kRingWords < 78;

  struct Shared {
    const uint8_t* expert[kMaxTopK];  // null: the pair is skipped
    int64_t row[kMaxTopK];
    float parts[kMaxTopK][kParts][kUnitRows];
    float rows[kMaxTopK][kUnitRows];
  };
  // A warp's units of the slots of its group.
  struct Walk {
    Shared* shared;
    int units;
    int slots;
    int slot;
    int part;
    int unit;

    MOESAIC_DEV bool more() const { return slot < slots; }
    MOESAIC_DEV const uint8_t* expert() const { return shared->expert[slot]; }
    // The token takes the place of all eight that a product has room for; the first is read.
    MOESAIC_DEV int64_t row() const { return shared->row[slot]; }
    MOESAIC_DEV bool advance() {
      unit += kParts;
      if (unit < units) return false;
      next_slot();
      skip();
      return true;
    }
    // Leaves out slots without work for this warp.
    MOESAIC_DEV void skip() {
      while (more() && (part >= units || shared->expert[slot] == nullptr)) next_slot();
    }
    MOESAIC_DEV void finish(typename Product::Totals& total, const Walk& next) const {
      if (next.slot == slot) return;
      const int g = static_cast<int>(threadIdx.x) % 32 / 4;
      if (threadIdx.x % 4 == 0) {
        shared->parts[slot][part][g] = total[0][0];
        shared->parts[slot][part][g + 8] = total[0][2];
      }
      MOESAIC_UNROLL
      for (float& value : total[0]) value = 0.0F;
    }

   private:
    MOESAIC_DEV void next_slot() {
      slot += kSlotGroups;
      part = (part - units) & (kParts - 1);
      unit = part;
    }
  };
};

template <class D, int kPlanes>
MOESAIC_KERNEL void __launch_bounds__(kDownSumThreads, 1) down_sum_kernel(DownSumArgs args) {
  dev::begin_grid();
  using Loop = DownSum<D, kPlanes>;
  MOESAIC_SHARED(typename Loop::Shared, shared);
  const op::Combine& combine = args.combine;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t token = blockIdx.x % combine.routing.num_tokens;
  const int row_block = static_cast<int>(blockIdx.x / combine.routing.num_tokens);
  const int32_t* const ids = combine.routing.topk_ids + token * combine.routing.top_k;

  if (thread < combine.routing.top_k) {
    const int64_t row = combined_row(combine, token * combine.routing.top_k + thread);
    shared.row[thread] = row;
    shared.expert[thread] = row >= 0 ? args.weight.expert(ids[thread]) : nullptr;
  }
  __syncthreads();

  const int warp = thread / 32;
  const int units = args.weight.units;
  typename Loop::Walk walk{&shared,       units,         combine.routing.top_k,
                           warp / kParts, warp % kParts, warp % kParts};
  walk.skip();
  typename Loop::Product(args.weight, args.x, row_block)
      .template run<Loop::kDepth, Loop::kXAhead>(walk);
  __syncthreads();

  const int parts = units < kParts ? units : kParts;
  for (int i = thread; i < combine.routing.top_k * kUnitRows; i += kDownSumThreads) {
    const int slot = i / kUnitRows, r = i % kUnitRows;
    const int64_t row = int64_t{row_block} * kUnitRows + r;
    if (shared.expert[slot] == nullptr || row >= combine.out.cols) continue;
    float sum = 0.0F;
    for (int part = 0; part < parts; ++part) sum += shared.parts[slot][part][r];
    shared.rows[slot][r] =
        rounded_to(combine.rows_dtype, args.out.finish(sum, ids[slot], combine.out.cols, row));
  }
  __syncthreads();

  const int64_t row = int64_t{row_block} * kUnitRows + thread;
  if (thread >= kUnitRows || row >= combine.out.cols) return;
  float sum = 0.0F;
  for (int slot = 0; slot < combine.routing.top_k; ++slot) {
    if (shared.expert[slot] == nullptr) continue;
    sum +=
        combined_weight(combine, token * combine.routing.top_k + slot) * shared.rows[slot][thread];
  }
  const int64_t at = token * combine.out.stride + row;
  if (combine.accumulate) sum = load_as(combine.out.dtype, combine.out.data, at) + sum;
  store_as(combine.out.dtype, combine.out.data, at, sum);
}

}  // namespace moesaic::cuda
