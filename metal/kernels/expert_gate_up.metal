/// expert_gate_up_<format>: out[destination] = activation(gate row, up row) of W_gate * x[source]
/// and W_up * x[source], for few entries per expert; f32 activations and sums.
///
///   threadgroup (rows 8t .. 8t + 7, segment s): simdgroup g has rows 8t + 2g and the next, of gate
///   and of up (expert_dot.h), so that only the hidden row is written, never its halves
///
/// Preconditions: ExpertGateUpArgs in arguments.h; gated activations; rows, cols, gather and format
/// of both roles agree. Not measured on hardware.

#include "activation.h"
#include "expert_dot.h"

/// Rows of each role that a simdgroup has.
constant constexpr int kPairRows = kDotRows / 2;

/// The arrays of one role.
struct RoleArrays {
  device const uchar* weights;
  device const int* slot_map;
  device const float* scale;
  device const float* bias;
};

template <class Decoder>
inline void expert_gate_up(thread const ExpertGateUpArgs& args, thread const RoleArrays& gate,
                           thread const RoleArrays& up, thread const RowMap& map,
                           device const uchar* x, device float* out, device const int* gather,
                           threadgroup float4* staged, uint3 position, uint simdgroup, uint lane) {
  const int segment = int(position.y);
  const int expert = segment_expert(map, segment);
  const int gate_slot = expert_slot(args.gate, gate.slot_map, expert);
  const int up_slot = expert_slot(args.up, up.slot_map, expert);
  if (gate_slot < 0 || up_slot < 0) return;
  device const uchar* gate_at = gate.weights + expert_offset(args.gate, gate_slot);
  device const uchar* up_at = up.weights + expert_offset(args.up, up_slot);
  device const int* columns = gather_of(args.gate, gather, expert);
  const int first_row = int(position.x) * kGateUpRows + int(simdgroup) * kPairRows;
  DotRows<Decoder> rows;
  for (int r = 0; r < kPairRows; r++) {
    const int row = min(first_row + r, args.gate.rows - 1);
    rows.row[r] = Decoder::row_at(args.gate, gate_at, row);
    rows.row[kPairRows + r] = Decoder::row_at(args.up, up_at, row);
  }
  const int end = segment_end(map, segment);
  for (int first = segment_begin(map, segment); first < end; first += kDotEntries) {
    const DotEntries entries = dot_entries(map, args.in, x, first, end);
    if (entries.count == 0) return;  // padding is trailing
    float sums[kDotRows][kDotEntries];
    dot_entries_with<Decoder>(args.gate, rows, columns, entries, simdgroup, lane, staged, sums);
    for (int r = 0; r < kPairRows; r++) {
      const int row = first_row + r;
      for (int e = 0; e < kDotEntries; e++) {
        if (lane != 0 || row >= args.gate.rows || entries.destination[e] < 0) continue;
        out[long(entries.destination[e]) * args.gate.rows + row] = activate(
            args.activation, finished(args.gate, gate.scale, gate.bias, expert, row, sums[r][e]),
            finished(args.up, up.scale, up.bias, expert, row, sums[kPairRows + r][e]));
      }
    }
  }
}

#define EXPERT_GATE_UP(suffix, Decoder)                                                            \
  kernel void expert_gate_up_##suffix(                                                             \
      constant ExpertGateUpArgs& args [[buffer(0)]],                                               \
      device const uchar* gate_weights [[buffer(1)]],                                              \
      device const int* gate_slot_map [[buffer(2)]], device const float* gate_scale [[buffer(3)]], \
      device const float* gate_bias [[buffer(4)]], device const int* map_expert [[buffer(5)]],     \
      device const int* map_offsets [[buffer(6)]], device const int* map_source [[buffer(7)]],     \
      device const int* map_destination [[buffer(8)]], device const uchar* x [[buffer(9)]],        \
      device float* out [[buffer(10)]], device const int* gather [[buffer(11)]],                   \
      device const uchar* up_weights [[buffer(12)]], device const int* up_slot_map [[buffer(13)]], \
      device const float* up_scale [[buffer(14)]], device const float* up_bias [[buffer(15)]],     \
      THREAD_POSITION) {                                                                           \
    THREADGROUP_ARRAY(float4, staged, [kDotEntries * kChunkQuads]);                                \
    const ExpertGateUpArgs own = args;                                                             \
    const RowMap map = {own.map, map_expert, map_offsets, map_source, map_destination};            \
    const RoleArrays gate = {gate_weights, gate_slot_map, gate_scale, gate_bias};                  \
    const RoleArrays up = {up_weights, up_slot_map, up_scale, up_bias};                            \
    expert_gate_up<Decoder>(own, gate, up, map, x, out, gather, staged, position, simdgroup,       \
                            lane);                                                                 \
  }
EXPERT_FORMATS(EXPERT_GATE_UP)
