// Weights, inputs and row maps for the expert kernels, and what they should compute, in f64.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "fake_runtime/fake_metal.hpp"
#include "int4/int4_format.hpp"
#include "layers.hpp"
#include "metal/arguments.h"
#include "moesaic/config.hpp"
#include "moesaic/quant.hpp"
#include "moesaic/types.hpp"
#include "random.hpp"
#include "seeds.hpp"

namespace moesaic::metal_test {

using namespace metal_args;

struct Format {
  QuantType type;
  const char* suffix;
};
inline constexpr Format kFormats[] = {
#define MOESAIC_METAL_FORMAT(type, suffix) {QuantType::type, #suffix},
#include "metal/kernels.inc"
};

// Ends at the end of its allocation, so that ASan sees a read behind it.
using Bytes = std::unique_ptr<std::byte[]>;

// One role [E, rows, cols]. Experts begin some kGap bytes apart from each other.
class Role {
 public:
  static constexpr std::int64_t kGap = 10;

  Role(QuantType type, int experts, int rows, int cols, testing::Random& random)
      : rows_(rows), cols_(cols) {
    args.num_experts = experts;
    args.rows = rows;
    args.cols = cols;
    decoded_.resize(static_cast<std::size_t>(experts) * rows * cols);
    if (type == QuantType::INT4) {
      make_panels(random);
    } else {
      make_rows(type, random);
    }
    scale_.resize(static_cast<std::size_t>(experts));
    bias_.resize(static_cast<std::size_t>(experts) * rows);
    for (float& v : scale_) v = 1.0f + random.normal() / 8;
    for (float& v : bias_) v = random.normal();
  }

  void add_epilogue() { args.flags |= kHasScale | kHasBias; }
  // Expert e lies at slot map[e], -1 for one that is not resident.
  void map_slots(std::vector<std::int32_t> map) {
    slot_map_ = std::move(map);
    // The order of an expert's columns goes by the expert, wherever that lies.
    const std::vector<std::int32_t> by_slot = gather_;
    for (std::size_t e = 0; args.gather_stride > 0 && e < slot_map_.size(); e++) {
      if (slot_map_[e] < 0) continue;
      const auto from = by_slot.begin() + slot_map_[e] * args.gather_stride;
      std::copy_n(from, args.gather_stride,
                  gather_.begin() + static_cast<std::ptrdiff_t>(e) * args.gather_stride);
    }
    args.flags |= kHasSlotMap;
  }
  bool skips(int expert) const {
    return expert < 0 || expert >= args.num_experts || slot(expert) < 0;
  }

  struct Sum {
    double value, magnitude;  // sum of w x, sum of |w x|, both with the epilogue
  };
  Sum product(int expert, int row, const float* x) const {
    const float* w = &decoded_[(static_cast<std::size_t>(slot(expert)) * rows_ + row) * cols_];
    Sum sum{};
    for (int c = 0; c < cols_; c++) {
      sum.value += static_cast<double>(w[c]) * x[c];
      sum.magnitude += std::fabs(static_cast<double>(w[c]) * x[c]);
    }
    if (args.flags & kHasScale) {
      sum.value *= scale_[expert];
      sum.magnitude *= std::fabs(scale_[expert]);
    }
    if (args.flags & kHasBias) {
      sum.value += bias_[static_cast<std::size_t>(expert) * rows_ + row];
      sum.magnitude += std::fabs(bias_[static_cast<std::size_t>(expert) * rows_ + row]);
    }
    return sum;
  }

  void* weights() { return bytes_.get(); }
  std::int64_t expert_bytes() const { return expert_bytes_; }
  void* gather() { return gather_.data(); }
  void* slots() { return slot_map_.data(); }
  void* scales() { return scale_.data(); }
  void* biases() { return bias_.data(); }

  WeightArgs args{};

 private:
  int slot(int expert) const {
    return args.flags & kHasSlotMap ? slot_map_[static_cast<std::size_t>(expert)] : expert;
  }
  float& decoded(int expert, int row, int col) {
    return decoded_[(static_cast<std::size_t>(expert) * rows_ + row) * cols_ + col];
  }
  // Memory for experts of this size, `step` bytes off every better alignment.
  void allocate(std::int64_t bytes, std::int64_t step) {
    expert_bytes_ = bytes;
    const std::int64_t gap = kGap / step * step;
    args.base = 3 * step;
    args.expert_stride = bytes + gap;
    const std::int64_t size = args.base + args.num_experts * args.expert_stride - gap;
    bytes_ = std::make_unique<std::byte[]>(static_cast<std::size_t>(size));
  }
  std::byte* expert(int e) { return bytes_.get() + args.base + e * args.expert_stride; }

  void make_rows(QuantType type, testing::Random& random) {
    // As badly aligned as the format may be.
    const std::int64_t step = type == QuantType::MXFP4 ? 1 : type == QuantType::F32 ? 4 : 2;
    args.stored_cols = cols_;
    args.row_stride = row_bytes(type, cols_) + step;
    allocate((rows_ - 1) * args.row_stride + row_bytes(type, cols_), step);
    std::vector<float> row(static_cast<std::size_t>(cols_));
    for (int e = 0; e < args.num_experts; e++) {
      for (int r = 0; r < rows_; r++) {
        std::byte* to = expert(e) + r * args.row_stride;
        if (testing::quick_codes(type)) {
          const std::int64_t bytes = row_bytes(type, cols_);
          for (std::int64_t i = 0; i < bytes; i++) to[i] = random.byte();
          for (std::int64_t i = 0; i < bytes; i += traits(type).block_bytes) {
            testing::set_scales(type, to + i, random);
          }
        } else {
          for (float& w : row) w = random.normal();
          quantize_row(type, row.data(), to, cols_);
        }
        dequantize_row(type, to, &decoded(e, r, 0), cols_);
      }
    }
  }

  // Panels as int4/int4_format.hpp describes them. What they are like follows from the columns alone, so
  // that two roles of the same shape can go together.
  void make_panels(testing::Random& random) {
    const int kind = cols_ / 8 % 4;
    const int4::Int4Layout layout{32 << kind, kind % 2 == 1, kind >= 2};
    args.scale_cols = layout.scale_cols;
    if (layout.scale_f32) args.flags |= kInt4ScaleF32;
    if (layout.zeros) args.flags |= kInt4HasZeros;
    const bool gathers = kind != 1;
    const int stored = (cols_ + 31) / 32 * 32 + (gathers ? 32 : 0);
    args.stored_cols = stored;
    args.row_stride = int4::int4_panel_bytes(layout, stored) + 4;
    allocate((rows_ + int4::kInt4Rows - 1) / int4::kInt4Rows * args.row_stride, 4);
    // Backwards, with the padding inside; experts have orders of their own, or share one.
    const int orders = gathers && kind != 2 ? args.num_experts : 1;
    for (int o = 0; gathers && o < orders; o++) {
      std::vector<std::int32_t> order;
      for (int c = 0; c < cols_; c++) order.push_back((2 * cols_ - 1 - c - o) % cols_);
      order.insert(order.begin() + 20, static_cast<std::size_t>(stored - cols_), -1);
      gather_.insert(gather_.end(), order.begin(), order.end());
    }
    if (gathers) args.flags |= kHasGather;
    args.gather_stride = orders > 1 ? stored : 0;
    for (int e = 0; e < args.num_experts; e++) {
      for (int r = 0; r < rows_; r++) fill_panel_row(layout, e, r, random);
    }
  }
  void fill_panel_row(const int4::Int4Layout& layout, int e, int r, testing::Random& random) {
    const int lane = r % int4::kInt4Rows;
    std::byte* const panel = expert(e) + r / int4::kInt4Rows * args.row_stride;
    float scale = 0;
    int zero = 8;
    for (int c = 0; c < args.stored_cols; c++) {
      const int in_record = c % int4::kInt4RecordCols;
      const int steps = int4::int4_steps(args.stored_cols, c / int4::kInt4RecordCols);
      std::byte* const record =
          panel + c / int4::kInt4RecordCols * int4::int4_record_bytes(layout, 8);
      const int at = in_record / layout.scale_cols * int4::kInt4Rows + lane;
      if (in_record % layout.scale_cols == 0) {
        scale = random.normal() / 8;
        std::byte* const scales = record + int4::int4_scales_at(steps);
        if (layout.scale_f32) {
          std::memcpy(scales + 4 * at, &scale, 4);
        } else {
          const std::uint16_t bits = f32_to_f16(scale);
          std::memcpy(scales + 2 * at, &bits, 2);
          scale = f16_to_f32(bits);
        }
        if (layout.zeros) {
          zero = random.below(17);
          record[int4::int4_zeros_at(layout, steps) + at] = static_cast<std::byte>(zero);
        }
      }
      const int code = random.below(16);
      record[int4::int4_byte(in_record, lane)] |=
          static_cast<std::byte>(code << int4::int4_shift(in_record));
      const int col =
          gather_.empty() ? c : gather_[static_cast<std::size_t>(e * args.gather_stride + c)];
      if (col >= 0 && col < cols_) decoded(e, r, col) = static_cast<float>(code - zero) * scale;
    }
  }

  int rows_, cols_;
  std::int64_t expert_bytes_ = 0;
  Bytes bytes_;
  std::vector<float> decoded_;
  std::vector<std::int32_t> slot_map_, gather_;
  std::vector<float> scale_, bias_;
};

// Rows of x in one of the three types, with a gap between rows.
class Input {
 public:
  Input(int rows, int cols, int type, testing::Random& random) : type_(type) {
    constexpr int kRowGap = 3;
    const int stride = cols + kRowGap;
    args = {.inner_count = 1, .outer_stride = stride, .inner_stride = 0};
    const std::size_t count = static_cast<std::size_t>(rows) * stride - kRowGap;
    values_.resize(count);
    bytes_ = std::make_unique<std::byte[]>(count * (type == kTypeF32 ? 4 : 2));
    for (std::size_t i = 0; i < count; i++) {
      const float v = random.normal();
      if (type == kTypeF32) {
        values_[i] = v;
        std::memcpy(&bytes_[4 * i], &v, 4);
      } else {
        const std::uint16_t bits = type == kTypeF16 ? f32_to_f16(v) : f32_to_bf16(v);
        values_[i] = type == kTypeF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
        std::memcpy(&bytes_[2 * i], &bits, 2);
      }
    }
  }

  const float* row(std::int64_t r) const {
    return &values_[static_cast<std::size_t>(r * args.outer_stride)];
  }
  int type() const { return type_; }
  void* data() { return bytes_.get(); }

  InputArgs args{};

 private:
  int type_;
  std::vector<float> values_;
  Bytes bytes_;
};

// A row map with its arrays, in the three shapes that the host makes.
struct Map {
  RowMapArgs args{};
  std::vector<std::int32_t> expert, offsets, source, destination;
  int max_entries = 0;  // of a segment

  // One segment per pair: expert ids as routing gave them, input row = pair / divisor.
  static Map pairs(std::vector<std::int32_t> ids, int divisor) {
    Map map;
    const int count = static_cast<int>(ids.size());
    map.expert = std::move(ids);
    map.args = {count, 1, divisor, count, kHasExpert, 0};
    map.max_entries = 1;
    return map;
  }

  // One segment per expert, stable: source is the token, destination the pair.
  static Map buckets(const std::vector<std::int32_t>& ids, int top_k, int experts) {
    Map map;
    map.offsets.push_back(0);
    for (int e = 0; e < experts; e++) {
      for (int pair = 0; pair < static_cast<int>(ids.size()); pair++) {
        if (ids[static_cast<std::size_t>(pair)] != e) continue;
        map.source.push_back(pair / top_k);
        map.destination.push_back(pair);
      }
      map.offsets.push_back(static_cast<std::int32_t>(map.source.size()));
      map.max_entries =
          std::max(map.max_entries, map.offsets.back() - map.offsets[map.offsets.size() - 2]);
    }
    map.args = {
        experts, 0, 1, static_cast<int>(ids.size()), kHasOffsets | kHasSource | kHasDestination, 0};
    return map;
  }

  // Blocks of `width` entries of one expert each; padding has destination = limit, and the block
  // behind the last has no expert.
  static Map blocks(const std::vector<std::int32_t>& ids, int top_k, int experts, int width) {
    const Map from = buckets(ids, top_k, experts);
    const int limit = from.args.limit;
    Map map;
    for (int e = 0; e < experts; e++) {
      for (int first = from.offsets[e]; first < from.offsets[e + 1]; first += width) {
        map.expert.push_back(e);
        for (int i = first; i < first + width; i++) {
          const bool real = i < from.offsets[e + 1];
          map.destination.push_back(real ? from.destination[i] : limit);
          map.source.push_back(real ? from.destination[i] : limit);
        }
      }
    }
    map.expert.push_back(-1);
    map.source.resize(map.source.size() + width, limit);
    map.destination.resize(map.destination.size() + width, limit);
    map.args = {static_cast<int>(map.expert.size()),       width, top_k, limit,
                kHasExpert | kHasSource | kHasDestination, 0};
    map.max_entries = width;
    return map;
  }

  int begin(int s) const { return args.flags & kHasOffsets ? offsets[s] : s * args.width; }
  int expert_of(int s) const { return args.flags & kHasExpert ? expert[s] : s; }
  int source_of(int i) const {
    return (args.flags & kHasSource ? source[i] : i) / args.source_divisor;
  }
  int destination_of(int i) const {
    const int row = args.flags & kHasDestination ? destination[i] : i;
    return row >= 0 && row < args.limit ? row : -1;
  }
};

inline constexpr std::uint32_t kPoison = 0xFFC0FFEE;  // a NaN

// Rows [limit, rows] of f32, poisoned, with the comparison.
class Output {
 public:
  Output(int limit, int rows)
      : rows_(rows), values_(static_cast<std::size_t>(limit) * rows), named_(values_.size()) {
    for (float& v : values_) std::memcpy(&v, &kPoison, 4);
  }
  void* data() { return values_.data(); }
  const std::vector<float>& values() const { return values_; }

  // The bound is on |result - value|; returns what is wrong, or nothing.
  std::string compare(int row, int column, double value, double bound) {
    const std::size_t at = static_cast<std::size_t>(row) * rows_ + column;
    named_[at] = true;
    const double error = std::fabs(values_[at] - value);
    if (error <= bound) return "";
    return "row " + std::to_string(row) + " column " + std::to_string(column) + ": got " +
           std::to_string(values_[at]) + ", expected " + std::to_string(value) + " within " +
           std::to_string(bound);
  }
  // Rows that no entry named must be as they were.
  std::string check_untouched() const {
    for (std::size_t i = 0; i < values_.size(); i++) {
      std::uint32_t bits;
      std::memcpy(&bits, &values_[i], 4);
      if (!named_[i] && bits != kPoison) return "element " + std::to_string(i) + " was written";
    }
    return "";
  }

 private:
  int rows_;
  std::vector<float> values_;
  std::vector<bool> named_;
};

// Runs the kernel of that name. `threads` is that of its loop.
inline void dispatch(const std::string& name, const void* args, std::vector<void*> buffers,
                     std::uint32_t x_groups, std::uint32_t y_groups, std::uint32_t threads) {
  const fake_metal::Kernel* kernel = fake_metal::find_kernel(name);
  if (!kernel) throw std::runtime_error("no kernel " + name);
  const std::uint32_t groups[3] = {x_groups, y_groups, 1};
  kernel->run(*kernel, args, buffers.data(), groups, threads);
}

// Routings that break kernels: empty experts, everything to one, ids outside, one token, none.
inline std::vector<std::vector<std::int32_t>> nasty_routings(int experts, int top_k,
                                                             testing::Random& random) {
  auto uniform = [&](int tokens) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens) * top_k);
    for (auto& id : ids) id = random.below(experts);
    return ids;
  };
  std::vector<std::vector<std::int32_t>> all;
  if (emulation::race_checked()) return {uniform(7)};
  all.push_back(uniform(9));
  all.push_back(std::vector<std::int32_t>(static_cast<std::size_t>(18) * top_k, experts - 1));
  all.push_back(uniform(1));
  all.push_back({});
  auto holes = uniform(7);
  for (std::size_t i = 0; i < holes.size(); i += 3) holes[i] = i % 2 ? -1 : experts + 4;
  all.push_back(holes);
  return all;
}

}  // namespace moesaic::metal_test
