// Products of experts for tests of emulated kernels: packed roles, row maps and their answers in
// f64.
#pragma once

#include <cmath>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "formats/pack.hpp"
#include "int4_role.hpp"
#include "launch.h"
#include "runtime/emulator.hpp"

namespace moesaic::testing {

// One format as the kernels know it.
struct Format {
  std::string name;
  QuantType type;
  Int4Recipe int4{};
  std::int64_t cols_step = 32;  // columns are a multiple of it

  // A width that leaves units and groups unfinished where the format allows it.
  std::int64_t odd_cols() const {
    if (type == QuantType::INT4) return 200;
    return cols_step == 256 ? 512 : cols_step == 8 ? 72 : 3 * cols_step;
  }
};

inline std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (const cuda::FormatRow& row : cuda::kFormats) {
    const auto type = static_cast<QuantType>(row.type);
    const int elems = traits(type).block_elems;
    formats.push_back({row.name, type, {}, elems == 1 ? 8 : elems});
  }
  const auto int4 = [&](const char* name, Int4Recipe recipe) {
    formats.push_back({name, QuantType::INT4, recipe, 8});
  };
  int4("int4_g128", {.group_size = 128});
  int4("int4_g64_zeros", {.group_size = 64, .zeros = true});
  int4("int4_g32_zeros_f32", {.group_size = 32, .zeros = true, .scale_f32 = true});
  int4("int4_g32_zeros", {.group_size = 32, .zeros = true});
  int4("int4_g32_f32", {.group_size = 32, .scale_f32 = true});
  int4("int4_g64_zeros_f32", {.group_size = 64, .zeros = true, .scale_f32 = true});
  int4("int4_g128_f32", {.group_size = 128, .scale_f32 = true});
  int4("int4_channel", {.group_size = -1});
  int4("int4_g32_order", {.group_size = 32, .order = Int4Recipe::Shared});
  int4("int4_g64_orders", {.group_size = 64, .zeros = true, .order = Int4Recipe::PerExpert});
  return formats;
}

inline TestRole make_format_role(const Format& format, std::int32_t experts, std::int64_t rows,
                                 std::int64_t cols, std::uint32_t seed, bool epilogue) {
  return format.type == QuantType::INT4
             ? make_int4_role(experts, rows, cols, format.int4, seed, epilogue)
             : make_role(experts, rows, cols, format.type, seed, epilogue);
}

// A role in units, in memory that starts at a multiple of 128.
struct PackedRole {
  std::shared_ptr<std::byte> memory;
  WeightRef ref;
  RoleWeights epilogue;

  RoleRef view() const {
    RoleWeights role = epilogue;
    role.ref = ref;
    role.ref.base = memory.get();
    return role.view();
  }
};

inline PackedRole pack_role(const TestRole& role, const TestRole* other = nullptr) {
  PackedRole packed;
  packed.ref = cuda::packed_ref(role.weights.ref, other ? UnitHalf::First : UnitHalf::Alone);
  packed.epilogue = role.weights;
  const auto bytes = static_cast<std::size_t>(packed.ref.num_experts * packed.ref.expert_stride);
  packed.memory = {static_cast<std::byte*>(std::aligned_alloc(128, bytes)), std::free};
  for (std::int32_t e = 0; e < packed.ref.num_experts; ++e) {
    cuda::pack_expert(role.weights.ref, other ? &other->weights.ref : nullptr, e,
                      packed.memory.get() + e * packed.ref.expert_stride);
  }
  return packed;
}
// The second half of shared units.
inline PackedRole second_half(const PackedRole& first, const TestRole& role) {
  PackedRole packed = first;
  packed.ref.half = UnitHalf::Second;
  packed.epilogue = role.weights;
  return packed;
}

// x as a type, and what the kernels then read.
struct Input {
  std::vector<std::byte> bytes;
  Floats values;
  InputRows rows;

  Input(std::int64_t count, std::int64_t cols, DType dtype, std::uint32_t seed)
      : bytes(static_cast<std::size_t>(count * cols * static_cast<std::int64_t>(size_of(dtype)))),
        values(random_values(count * cols, seed)),
        rows(dense_rows(bytes.data(), dtype, count, cols)) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::F32) {
        std::memcpy(bytes.data() + 4 * i, &values[i], 4);
        continue;
      }
      const bool half = dtype == DType::F16;
      const std::uint16_t bits = half ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
      std::memcpy(bytes.data() + 2 * i, &bits, 2);
      values[i] = half ? f16_to_f32(bits) : bf16_to_f32(bits);
    }
  }
};

// A row map with its arrays.
struct Map {
  std::string name;
  std::vector<std::int32_t> expert{}, offsets{}, source{}, destination{};
  RowMap facts{};  // without the arrays

  Map(const char* text, std::int32_t limit) : name(text) { facts.limit = limit; }
  RowMap view() const {
    RowMap m = facts;
    const auto data = [](const std::vector<std::int32_t>& v) {
      return v.empty() ? nullptr : v.data();
    };
    m.expert = data(expert);
    m.offsets = data(offsets);
    m.source = data(source);
    m.destination = data(destination);
    return m;
  }
  // Calls visit(expert, source row, destination row) for each real entry.
  void for_each(std::int32_t num_experts,
                const std::function<void(std::int32_t, std::int64_t, std::int64_t)>& visit) const {
    for (std::int32_t s = 0; s < facts.num_segments; ++s) {
      const auto at = static_cast<std::size_t>(s);
      const std::int32_t e = expert.empty() ? s : expert[at];
      if (e < 0 || e >= num_experts) continue;
      const std::int32_t first = offsets.empty() ? s * facts.width : offsets[at];
      const std::int32_t last = offsets.empty() ? (s + 1) * facts.width : offsets[at + 1];
      for (std::int32_t i = first; i < last; ++i) {
        const auto entry = static_cast<std::size_t>(i);
        const std::int32_t to = destination.empty() ? i : destination[entry];
        if (to < 0 || to >= facts.limit) continue;
        visit(e, (source.empty() ? i : source[entry]) / facts.source_divisor, to);
      }
    }
  }
};

inline std::int32_t pairs_of(const Routing& routing) {
  return static_cast<std::int32_t>(routing.num_tokens()) * routing.top_k();
}

// Every pair a segment of its own.
inline Map pairs_map(const Routing& routing) {
  const std::int32_t pairs = pairs_of(routing);
  Map map("pairs", pairs);
  map.expert.assign(routing.topk_ids().begin(), routing.topk_ids().end());
  map.facts.num_segments = pairs;
  map.facts.source_divisor = routing.top_k();
  return map;
}

// Pairs sorted by expert.
inline Map buckets_map(const Routing& routing, std::int32_t experts) {
  const std::int32_t pairs = pairs_of(routing);
  Map map("buckets", pairs);
  map.offsets.push_back(0);
  for (std::int32_t e = 0; e < experts; ++e) {
    for (std::int32_t p = 0; p < pairs; ++p) {
      if (routing.topk_ids()[p] != e) continue;
      map.source.push_back(p / routing.top_k());
      map.destination.push_back(p);
    }
    map.offsets.push_back(static_cast<std::int32_t>(map.destination.size()));
  }
  map.source.resize(static_cast<std::size_t>(pairs), -1);
  map.destination.resize(static_cast<std::size_t>(pairs), -1);
  map.facts.num_segments = experts;
  return map;
}

// Blocks of `width` sorted ids of one expert, padding = P, two blocks behind the end.
inline Map blocks_map(const Routing& routing, std::int32_t experts, std::int32_t width) {
  const std::int32_t pairs = pairs_of(routing);
  Map map("blocks", pairs);
  for (std::int32_t e = 0; e < experts; ++e) {
    for (std::int32_t p = 0; p < pairs; ++p) {
      if (routing.topk_ids()[p] != e) continue;
      if (map.destination.size() % static_cast<std::size_t>(width) == 0) map.expert.push_back(e);
      map.destination.push_back(p);
    }
    while (map.destination.size() % static_cast<std::size_t>(width) != 0) {
      map.destination.push_back(pairs);
    }
  }
  for (int i = 0; i < 2; ++i) map.expert.push_back(-1);
  map.destination.resize(map.expert.size() * static_cast<std::size_t>(width), pairs);
  map.source = map.destination;
  map.facts.num_segments = static_cast<std::int32_t>(map.expert.size());
  map.facts.width = width;
  map.facts.source_divisor = routing.top_k();
  return map;
}

// One expert, all rows.
inline Map single_map(std::int32_t rows) {
  Map map("single", rows);
  map.facts.num_segments = 1;
  map.facts.width = rows;
  return map;
}

// Scratch of exactly the promised size, filled with NaN.
class Scratch {
 public:
  Scratch(const Map& map, std::int64_t num_in, const WeightRef& weight, bool separate)
      : bytes_(cuda::gemm_scratch_bytes({.num_rows = map.facts.limit,
                                         .num_in = num_in,
                                         .cols = std::max(weight.cols, weight.int4.packed_cols),
                                         .out_cols = weight.rows,
                                         .num_experts = weight.num_experts,
                                         .separate = separate})),
        memory_(static_cast<std::byte*>(std::aligned_alloc(64, static_cast<std::size_t>(bytes_))),
                std::free) {
    std::memset(memory_.get(), 0xFF, static_cast<std::size_t>(bytes_));
  }
  std::byte* data() const { return memory_.get(); }

 private:
  std::int64_t bytes_;
  std::shared_ptr<std::byte> memory_;
};

// rel_l2 of a result of which only some values are to be written. Where the answer is NaN the poison
// must be there still, else the error is infinite.
inline double relative_error(const Floats& got, const Doubles& want) {
  Floats written;
  Doubles answer;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (std::isnan(want[i])) {
      if (!std::isnan(got[i])) return HUGE_VAL;
    } else {
      written.push_back(got[i]);
      answer.push_back(want[i]);
    }
  }
  return rel_l2(written, answer);
}

// Largest error of an element over its sum of |w| |x|.
inline double largest_error(const Floats& got, const Doubles& want, const Doubles& magnitude) {
  double largest = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(want[i])) continue;
    largest = std::max(largest, std::abs(static_cast<double>(got[i]) - want[i]) / magnitude[i]);
  }
  return largest;
}

}  // namespace moesaic::testing
