/// expert_gemv_<format>: out[destination] = W[expert] * x[source] for few entries per expert, f32
/// activations and sums.
///
///   threadgroup (rows 16t .. 16t + 15, segment s): simdgroup g has rows 16t + 4g and the next three
///   and walks the entries of the segment two at a time (expert_dot.h)
///
/// Preconditions: ExpertGemvArgs in arguments.h; any rows and cols (cols a multiple of the block),
/// weights as aligned as their block, an expert's row below 4 GiB. Not measured on hardware.

#include "expert_dot.h"

template <class Decoder>
inline void expert_gemv(thread const ExpertGemvArgs& args, device const uchar* weights,
                        device const int* slot_map, device const float* scale,
                        device const float* bias, thread const RowMap& map, device const uchar* x,
                        device float* out, device const int* gather, threadgroup float4* staged,
                        uint3 position, uint simdgroup, uint lane) {
  const int segment = int(position.y);
  const int expert = segment_expert(map, segment);
  const int slot = expert_slot(args.weight, slot_map, expert);
  if (slot < 0) return;
  device const uchar* at = weights + expert_offset(args.weight, slot);
  device const int* columns = gather_of(args.weight, gather, expert);
  const int first_row = int(position.x) * kGemvRows + int(simdgroup) * kDotRows;
  // Rows behind the last one repeat it; their sums are not stored.
  DotRows<Decoder> rows;
  for (int r = 0; r < kDotRows; r++) {
    rows.row[r] = Decoder::row_at(args.weight, at, min(first_row + r, args.weight.rows - 1));
  }
  const int end = segment_end(map, segment);
  for (int first = segment_begin(map, segment); first < end; first += kDotEntries) {
    const DotEntries entries = dot_entries(map, args.in, x, first, end);
    if (entries.count == 0) return;  // padding is trailing
    float sums[kDotRows][kDotEntries];
    dot_entries_with<Decoder>(args.weight, rows, columns, entries, simdgroup, lane, staged, sums);
    for (int r = 0; r < kDotRows; r++) {
      const int row = first_row + r;
      for (int e = 0; e < kDotEntries; e++) {
        if (lane != 0 || row >= args.weight.rows || entries.destination[e] < 0) continue;
        out[long(entries.destination[e]) * args.weight.rows + row] =
            finished(args.weight, scale, bias, expert, row, sums[r][e]);
      }
    }
  }
}

#define EXPERT_GEMV(suffix, Decoder)                                                           \
  kernel void expert_gemv_##suffix(                                                            \
      constant ExpertGemvArgs& args [[buffer(0)]], device const uchar* weights [[buffer(1)]],  \
      device const int* slot_map [[buffer(2)]], device const float* scale [[buffer(3)]],       \
      device const float* bias [[buffer(4)]], device const int* map_expert [[buffer(5)]],      \
      device const int* map_offsets [[buffer(6)]], device const int* map_source [[buffer(7)]], \
      device const int* map_destination [[buffer(8)]], device const uchar* x [[buffer(9)]],    \
      device float* out [[buffer(10)]], device const int* gather [[buffer(11)]],               \
      THREAD_POSITION) {                                                                       \
    THREADGROUP_ARRAY(float4, staged, [kDotEntries * kChunkQuads]);                            \
    const ExpertGemvArgs own = args;                                                           \
    const RowMap map = {own.map, map_expert, map_offsets, map_source, map_destination};        \
    expert_gemv<Decoder>(own, weights, slot_map, scale, bias, map, x, out, gather, staged,     \
                         position, simdgroup, lane);                                           \
  }
EXPERT_FORMATS(EXPERT_GEMV)
