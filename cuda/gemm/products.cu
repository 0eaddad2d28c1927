// The products of experts: what is staged, which kernel runs, with which output.
#include "gemm/kernels.h"
#include "launch.h"

namespace moesaic::cuda {
namespace {

constexpr int64_t kAlign = 64;

constexpr int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

struct Kernel {
  int32_t type;
  int32_t small_groups;  // of INT4: scales per 32 columns
  const char* gemm_name;
  const char* gate_up_name;
  const char* down_name;
  const char* down_sum_name;
  const Launchers* launchers;
};

#define MOESAIC_ROW(value, small_groups, name) \
  {value,                                      \
   small_groups,                               \
   "gemm_" #name "_mma",                       \
   "gate_up_" #name "_mma",                    \
   "down_" #name "_mma",                       \
   "down_sum_" #name "_mma",                   \
   &name##_launchers},
constexpr Kernel kKernels[] = {
#define MOESAIC_FORMAT(TYPE, value, name, unit_bytes, scale) MOESAIC_ROW(value, 0, name)
#include "formats/formats.inc"
#undef MOESAIC_FORMAT
    MOESAIC_ROW(kInt4Type, 0, int4) MOESAIC_ROW(kInt4Type, 1, int4_g32)};
#undef MOESAIC_ROW

// INT4 has kernels for each layout of its scale records, under one name.
const Launchers* launchers_for(const Kernel& kernel, const WeightRef& weight) {
  if (weight.type != QuantType::INT4) return kernel.launchers;
  constexpr const Launchers* kInt4[2][2][2] = {
      {{&int4_launchers, &int4_zeros_launchers}, {&int4_f32_launchers, &int4_f32_zeros_launchers}},
      {{&int4_g32_launchers, &int4_g32_zeros_launchers},
       {&int4_g32_f32_launchers, &int4_g32_f32_zeros_launchers}}};
  const Int4Format& int4 = weight.int4;
  return kInt4[kernel.small_groups][int4.scale_f32 ? 1 : 0][int4.zeros ? 1 : 0];
}

const Kernel* find_kernel(const WeightRef& weight) {
  const bool int4 = weight.type == QuantType::INT4;
  const int32_t small_groups = int4 && weight.int4.scale_cols < kUnitCols ? 1 : 0;
  for (const Kernel& kernel : kKernels) {
    if (kernel.type == static_cast<int32_t>(weight.type) && kernel.small_groups == small_groups)
      return &kernel;
  }
  return nullptr;
}

// bf16 planes of x: bf16 itself is one; f16 and 16 bits of f32 are two.
int32_t planes_of(DType dtype, Precision precision) {
  return dtype == DType::BF16 || (dtype == DType::F32 && precision == Precision::Fast) ? 1 : 2;
}

// How many tokens a tile holds. A narrow tile wastes fewer columns, a wide one reads weights fewer
// times. For a map with offsets the mean number of rows decides; that threshold is not measured. The
// two loops add K in different orders, so their bits differ.
int32_t tile_width(const RowMap& map, int32_t num_experts, bool batch_invariant) {
  const int64_t mean = map.offsets != nullptr ? map.limit / num_experts : map.width;
  return batch_invariant || mean <= kNarrowTokens / 2 ? kNarrowTokens : kWideTokens;
}

// Weights whose experts have orders of columns of their own: x is staged for each entry.
bool orders_differ(const WeightRef& weight) {
  return weight.int4.gather != nullptr && weight.int4.gather_stride != 0;
}

// Whether down is multiplied and summed at once, which reads weights once per pair. Pairs that are
// segments of their own share nothing anyway. Of sorted ones there must be few: at uniform routing
// P pairs of E experts read less than 1 + P / 2E times the bytes that they would sharing, here at
// most 9/8, and neighbours in the grid find those in L2. Not measured.
bool sums_at_once(int64_t num_pairs, int32_t num_experts, bool sorted) {
  return !sorted || 4 * num_pairs <= num_experts;
}

// The fused kernel also needs the map's rows to be the rows that combine reads.
bool sums_at_once(const op::Down& args) {
  const RowMap& map = args.map;
  const WeightRef& weight = args.weight.ref;
  const op::Combine& sum = args.combine;
  const bool sorted = map.offsets != nullptr || map.width != 1;
  return map.source == map.destination && map.source_divisor == 1 &&
         map.limit == sum.routing.num_pairs() && weight.half == UnitHalf::Alone &&
         weight.rows == sum.out.cols && sum.routing.top_k <= kMaxTopK &&
         sums_at_once(map.limit, weight.num_experts, sorted);
}

// Hands out a phase's scratch in order.
class Carver {
 public:
  Carver(void* memory, int64_t bytes) : memory_(static_cast<char*>(memory)), left_(bytes) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = aligned(count * static_cast<int64_t>(sizeof(T)));
    left_ -= bytes;
    char* const at = memory_;
    memory_ += bytes;
    return reinterpret_cast<T*>(at);
  }
  bool overrun() const { return left_ < 0; }

 private:
  char* memory_;
  int64_t left_;
};

int64_t staged_bytes(int64_t rows, int64_t units, int64_t num_planes) {
  return aligned(rows * units * num_planes * kPlaneBytes) + aligned(rows * units * kUnitSums * 4);
}
int64_t list_bytes(int64_t max_tiles) {
  return aligned(max_tiles * int64_t{sizeof(Tile)}) + kAlign;
}

// The tiles of a map with offsets: no more than its entries, and one more for each part of a width.
constexpr int64_t most_tiles(int64_t rows) { return rows + rows / kNarrowTokens; }

// Elements from row to row of x that products can read as it comes: bf16 rows of `units` whole units
// that lie at multiples of 16 bytes. Negative: it must be staged.
int64_t readable_stride(const InputRows& in, int64_t units) {
  const bool even = in.inner_count == 1 || in.outer_stride == in.inner_count * in.inner_stride;
  const int64_t stride = in.inner_count == 1 ? in.outer_stride : in.inner_stride;
  const bool whole = in.dtype == DType::BF16 && in.cols == units * kUnitCols && even;
  return whole && stride % 8 == 0 && reinterpret_cast<uintptr_t>(in.data) % 16 == 0 ? stride : -1;
}

// Bytes of scratch that a call of this size was promised.
GemmSizes sizes_of(const WeightRef& weight, const RowMap& map, const InputRows& in) {
  const int64_t packed = weight.int4.packed_cols;
  return {.num_rows = map.limit,
          .num_in = in.num_rows,
          .cols = weight.cols > packed ? weight.cols : packed,
          .out_cols = weight.rows,
          .num_experts = weight.num_experts,
          .separate = false};
}

// One phase over one map and one input: staging, then one or two products.
class Phase {
 public:
  template <class Args>
  Phase(const Args& args, const GemmSizes& sizes, Stream stream)
      : map_(args.map),
        in_(args.in),
        precision_(args.precision),
        batch_invariant_(args.batch_invariant),
        carver_(args.scratch, gemm_scratch_bytes(sizes)),
        stream_(stream) {}

  bool empty() const { return map_.limit <= 0 || map_.num_segments <= 0; }
  Carver& carver() { return carver_; }

  int32_t make_tiles(int32_t num_experts) {
    const int32_t width = tile_width(map_, num_experts, batch_invariant_);
    max_tiles_ = tiles_bound(map_, width);
    tiles_ = {map_, nullptr, nullptr, width, num_experts};
    if (map_.offsets == nullptr) return kOk;
    auto* const list = carver_.take<Tile>(max_tiles_);
    auto* const count = carver_.take<int32_t>(1);
    if (carver_.overrun()) return kBadArguments;
    tiles_.list = list;
    tiles_.num_tiles = count;
    return launch_tiles({.map = map_,
                         .tiles = list,
                         .num_tiles = count,
                         .max_tiles = static_cast<int32_t>(max_tiles_),
                         .width = width,
                         .num_experts = num_experts},
                        stream_);
  }

  // Stages of the input what `weight` does not read as it comes.
  int32_t stage(const WeightRef& weight) {
    StageArgs args{};
    args.in = in_;
    args.cols = weight.int4.gather != nullptr ? weight.int4.packed_cols : weight.cols;
    args.gather = weight.int4.gather;
    args.gather_stride = weight.int4.gather_stride;
    const Launchers& launchers = *launchers_for(*find_kernel(weight), weight);
    const bool wide = tiles_.width == kWideTokens;
    args.sums = launchers.sums == SumsOfX::Excess && !wide ? SumsOfX::None : launchers.sums;
    args.scale_groups = launchers.scale_groups;
    args.shift = launchers.shift;
    args.tiles = tiles_;
    staged_.units = static_cast<int32_t>(blocks_of(packed_facts(weight).cols, kUnitCols));
    staged_.num_planes = planes_of(in_.dtype, precision_);
    staged_.by_destination = orders_differ(weight) ? 1 : 0;
    const int64_t rows = staged_.by_destination != 0 ? map_.limit : in_.num_rows;
    const int64_t stride = weight.int4.gather != nullptr ? -1 : readable_stride(in_, staged_.units);
    if (stride >= 0) {
      staged_.rows = static_cast<const uint8_t*>(in_.data);
      staged_.row_bytes = 2 * stride;
    } else {
      staged_.row_bytes = int64_t{staged_.units} * staged_.num_planes * kPlaneBytes;
      args.planes = carver_.take<uint32_t>(rows * staged_.row_bytes / 4);
      staged_.rows = reinterpret_cast<const uint8_t*>(args.planes);
    }
    if (args.sums != SumsOfX::None) {
      staged_.sums = carver_.take<uint32_t>(rows * staged_.units * kUnitSums);
    }
    if (carver_.overrun()) return kBadArguments;
    if (args.planes == nullptr && args.sums == SumsOfX::None) return kOk;
    args.out = staged_;
    return for_element_type(in_.dtype, [&]<DType kType>() -> int32_t {
      const dim3 threads(32 * kStageWarps);
      const auto stream = static_cast<dev::Stream>(stream_);
      if (staged_.by_destination != 0) {
        return dev::launch_dependent(stage_entries_kernel<kType>,
                                     dim3(static_cast<unsigned>(max_tiles_)), threads, 0, stream,
                                     args);
      }
      const int64_t blocks = blocks_of(rows * staged_.units, kStageWarps);
      if (blocks > INT32_MAX) return kUnsupported;
      return dev::launch_dependent(stage_kernel<kType>, dim3(static_cast<unsigned>(blocks)),
                                   threads, 0, stream, args);
    });
  }

  int32_t multiply(const WeightRef& weight, const OutputArgs& out) const {
    return launchers_for(*find_kernel(weight), weight)
        ->product({packed_weight(weight), tiles_, staged_, out}, max_tiles_, stream_);
  }

  int32_t multiply_and_sum(const RoleRef& weight, const op::Combine& combine) const {
    const RoleOutput out{weight.scale, weight.bias};
    return launchers_for(*find_kernel(weight.ref), weight.ref)
        ->down_sum({packed_weight(weight.ref), staged_, out, combine}, stream_);
  }

 private:
  RowMap map_;
  InputRows in_;
  Precision precision_;
  bool batch_invariant_;
  Carver carver_;
  Stream stream_;
  int64_t max_tiles_ = 0;
  TileSource tiles_{};
  StagedRows staged_{};
};

// Rows of one role alone, or its half of shared units.
OutputArgs role_output(const RoleRef& weight, void* data, DType dtype) {
  OutputArgs out{};
  out.data = data;
  out.rows = weight.ref.rows;
  out.dtype = dtype;
  out.select = static_cast<Select>(weight.ref.half);
  out.first = {weight.scale, weight.bias};
  return out;
}
static_assert(static_cast<Select>(UnitHalf::Alone) == Select::All &&
              static_cast<Select>(UnitHalf::First) == Select::First &&
              static_cast<Select>(UnitHalf::Second) == Select::Second);

int32_t run_product(Phase& phase, const RoleRef& weight, void* out, DType dtype) {
  if (find_kernel(weight.ref) == nullptr) return kUnsupported;
  if (const int32_t error = phase.make_tiles(weight.ref.num_experts)) return error;
  if (const int32_t error = phase.stage(weight.ref)) return error;
  return phase.multiply(weight.ref, role_output(weight, out, dtype));
}

int32_t run_down_sum(Phase& phase, const RoleRef& weight, const op::Combine& combine) {
  if (find_kernel(weight.ref) == nullptr) return kUnsupported;
  if (orders_differ(weight.ref)) {
    if (const int32_t error = phase.make_tiles(weight.ref.num_experts)) return error;
  }
  if (const int32_t error = phase.stage(weight.ref)) return error;
  return phase.multiply_and_sum(weight, combine);
}

bool share_units(const WeightRef& gate, const WeightRef& up) {
  return gate.half == UnitHalf::First && up.half == UnitHalf::Second && gate.base == up.base &&
         gate.table == up.table;
}

}  // namespace

int32_t load_stage_kernels() {
  return dev::load(stage_kernel<DType::F32>, stage_kernel<DType::F16>, stage_kernel<DType::BF16>,
                   stage_entries_kernel<DType::F32>, stage_entries_kernel<DType::F16>,
                   stage_entries_kernel<DType::BF16>);
}

int32_t load_product_kernels(const WeightRef& weight) {
  const Kernel* const kernel = find_kernel(weight);
  return kernel != nullptr ? launchers_for(*kernel, weight)->load() : kUnsupported;
}

int32_t launch_gemm(const op::Gemm& args, Stream stream) {
  Phase phase(args, sizes_of(args.weight.ref, args.map, args.in), stream);
  if (phase.empty()) return kOk;
  return run_product(phase, args.weight, args.out, args.out_dtype);
}

int32_t launch_gate_up(const op::GateUp& args, Stream stream) {
  const WeightRef& gate = args.gate.ref;
  const WeightRef& up = args.up.ref;
  const bool gated = static_cast<bool>(gate);
  GemmSizes sizes = sizes_of(up, args.map, args.in);
  sizes.separate = gated && !share_units(gate, up);
  // With a column order of its own, gate can be padded to more columns than up.
  if (gated && gate.int4.packed_cols > sizes.cols) sizes.cols = gate.int4.packed_cols;
  Phase phase(args, sizes, stream);
  if (phase.empty()) return kOk;
  if (find_kernel(up) == nullptr || (gated && find_kernel(gate) == nullptr)) return kUnsupported;
  if (const int32_t error = phase.make_tiles(up.num_experts)) return error;

  OutputArgs out = role_output(args.up, args.hidden, args.hidden_dtype);
  out.row_weight = args.row_weight;
  out.activated = true;
  out.activation = args.activation;
  if (gated && !sizes.separate) {
    out.select = Select::Pairs;
    out.first = {args.gate.scale, args.gate.bias};
    out.second = {args.up.scale, args.up.bias};
  } else if (gated) {
    auto* const gate_rows = phase.carver().take<float>(args.map.limit * gate.rows);
    if (phase.carver().overrun()) return kBadArguments;
    if (const int32_t error = phase.stage(gate)) return error;
    OutputArgs gate_out = role_output(args.gate, gate_rows, DType::F32);
    gate_out.row_weight = args.row_weight;
    if (const int32_t error = phase.multiply(gate, gate_out)) return error;
    out.gate_rows = gate_rows;
  }
  if (const int32_t error = phase.stage(up)) return error;
  return phase.multiply(up, out);
}

int32_t launch_down(const op::Down& args, Stream stream) {
  Phase phase(args, sizes_of(args.weight.ref, args.map, args.in), stream);
  if (!phase.empty()) {
    if (sums_at_once(args)) return run_down_sum(phase, args.weight, args.combine);
    if (const int32_t error = run_product(phase, args.weight, args.rows, args.combine.rows_dtype)) {
      return error;
    }
  }
  return launch_combine(args.combine, stream);
}

int64_t gemm_scratch_bytes(const GemmSizes& args) {
  const int64_t rows = args.num_rows > args.num_in ? args.num_rows : args.num_in;
  const int64_t staged = staged_bytes(rows, blocks_of(args.cols, kUnitCols), 2);
  // Gate and up of different types may need x in different column orders, so there is room for a
  // second staging and for the rows of gate.
  const int64_t separate = args.separate ? staged + aligned(args.num_rows * args.out_cols * 4) : 0;
  return list_bytes(most_tiles(args.num_rows)) + staged + separate;
}

const char* gemm_name(const WeightRef& weight) {
  const Kernel* const kernel = find_kernel(weight);
  return kernel != nullptr ? kernel->gemm_name : nullptr;
}

const char* down_name(const WeightRef& weight, int64_t num_pairs, bool sorted) {
  const Kernel* const kernel = find_kernel(weight);
  if (kernel == nullptr) return nullptr;
  return sums_at_once(num_pairs, weight.num_experts, sorted) ? kernel->down_sum_name
                                                             : kernel->down_name;
}

const KernelRow* gemm_kernels(int32_t* count) {
  constexpr int kNum = static_cast<int>(sizeof kKernels / sizeof *kKernels);
  constexpr int kRows = 4;
  static KernelRow rows[kRows * kNum];
  static const bool filled = [] {
    KernelRow* row = rows;
    for (const Kernel& kernel : kKernels) {
      const auto type = static_cast<QuantType>(kernel.type);
      *row++ = {"expert_gemm", kernel.gemm_name, type, 80};
      *row++ = {"gate_up", kernel.gate_up_name, type, 80};
      *row++ = {"down", kernel.down_name, type, 80};
      *row++ = {"down", kernel.down_sum_name, type, 80};
    }
    return true;
  }();
  (void)filled;
  *count = kRows * kNum;
  return rows;
}

}  // namespace moesaic::cuda
