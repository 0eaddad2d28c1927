/// expert_gate_up_<format>: out[destination] = activation(gate row, up row) of W_gate * x[source]
/// and W_up * x[source], for few entries per expert; f32 activations and sums.
///
///   threadgroups, simdgroups and entries are those of expert_gemv.metal; a simdgroup computes two
///   rows of gate and the same two of up, so that only the hidden row is written, never its halves
///
/// Preconditions: ExpertGateUpArgs in arguments.h; gated activations; rows, cols and format of both
/// roles agree. Not measured on hardware.

#include "activation.h"
#include "expert_dot.h"

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
                           device const uchar* x, device float* out, uint3 position, uint simdgroup,
                           uint lane) {
  const int segment = int(position.y);
  const int expert = segment_expert(map, segment);
  const int gate_slot = expert_slot(args.gate, gate.slot_map, expert);
  const int up_slot = expert_slot(args.up, up.slot_map, expert);
  const int first_row = int(position.x) * kGemvRows + int(simdgroup) * kDotRows;
  if (gate_slot < 0 || up_slot < 0 || first_row >= args.gate.rows) return;
  device const uchar* gate_at = gate.weights + expert_offset(args.gate, gate_slot);
  device const uchar* up_at = up.weights + expert_offset(args.up, up_slot);
  const int end = segment_end(map, segment);
  for (int first = segment_begin(map, segment); first < end; first += kDotEntries) {
    const DotEntries entries = dot_entries(map, args.in, first, end);
    float g[kDotRows][kDotEntries], u[kDotRows][kDotEntries];
    dot_rows<Decoder>(args.gate, gate_at, first_row, x, entries, lane, g);
    dot_rows<Decoder>(args.up, up_at, first_row, x, entries, lane, u);
    for (int r = 0; r < kDotRows; r++) {
      const int row = first_row + r;
      for (int e = 0; e < kDotEntries; e++) {
        if (lane != 0 || row >= args.gate.rows || entries.destination[e] < 0) continue;
        out[long(entries.destination[e]) * args.gate.rows + row] = activate(
            args.activation, finished(args.gate, gate.scale, gate.bias, expert, row, g[r][e]),
            finished(args.up, up.scale, up.bias, expert, row, u[r][e]));
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
      device float* out [[buffer(10)]], device const uchar* up_weights [[buffer(11)]],             \
      device const int* up_slot_map [[buffer(12)]], device const float* up_scale [[buffer(13)]],   \
      device const float* up_bias [[buffer(14)]], THREAD_POSITION) {                               \
    const ExpertGateUpArgs own = args;                                                             \
    const RowMap map = {own.map, map_expert, map_offsets, map_source, map_destination};            \
    const RoleArrays gate = {gate_weights, gate_slot_map, gate_scale, gate_bias};                  \
    const RoleArrays up = {up_weights, up_slot_map, up_scale, up_bias};                            \
    expert_gate_up<Decoder>(own, gate, up, map, x, out, position, simdgroup, lane);                \
  }
EXPERT_FORMATS(EXPERT_GATE_UP)
