// The expert products of the CPU backend: every format on every instruction set of this machine,
// against f64 on the decoded weights and against the scalar twin; panels against rows, bit for bit.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "cpu/isa.hpp"
#include "cpu/pack.hpp"
#include "moesaic/moesaic.hpp"

namespace moesaic {
namespace {

constexpr QuantType kTypes[] = {
#define MOESAIC_KERNEL(TYPE, NAME) QuantType::TYPE,
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
};

bool is_float(QuantType type) {
  return type == QuantType::F32 || type == QuantType::F16 || type == QuantType::BF16;
}

std::vector<float> gaussian(std::int64_t count, unsigned seed, float sigma = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, sigma);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(random);
  return values;
}

/// Overwrites the scale fields of a block of random bytes with values that a file could hold.
void sane_scales(QuantType type, std::byte* block, std::mt19937& random) {
  const auto put_half = [&](int offset) {
    const std::uint16_t h = f32_to_f16(0.01F + 0.001F * static_cast<float>(random() % 32));
    std::memcpy(block + offset, &h, 2);
  };
  switch (type) {
    case QuantType::NVFP4:
      for (int i = 0; i < 4; ++i) block[i] = static_cast<std::byte>(0x20 + random() % 24);
      break;
    case QuantType::IQ1_M: {
      // The top nibbles of four words make an f16.
      const std::uint16_t h = f32_to_f16(0.01F + 0.001F * static_cast<float>(random() % 32));
      for (int i = 0; i < 4; ++i) {
        auto& top = block[48 + 2 * i + 1];
        top = (top & std::byte{0x0f}) | static_cast<std::byte>((h >> (4 * i) & 15) << 4);
      }
      break;
    }
    case QuantType::TQ1_0:
      put_half(52);
      break;
    case QuantType::TQ2_0:
      put_half(64);
      break;
    default:
      put_half(0);
  }
}

/// [E, rows, cols] in the file layout.
RoleWeights make_weights(QuantType type, std::int32_t experts, std::int64_t rows, std::int64_t cols,
                         unsigned seed) {
  RoleWeights out;
  WeightRef& ref = out.ref;
  ref.type = type;
  ref.num_experts = experts;
  ref.rows = rows;
  ref.cols = cols;
  ref.row_stride = row_bytes(type, cols);
  ref.expert_stride = rows * ref.row_stride;
  auto bytes = std::make_shared<std::vector<std::byte>>(
      static_cast<std::size_t>(experts * ref.expert_stride));
  std::mt19937 random(seed);
  const QuantTraits& facts = traits(type);
  for (std::int64_t r = 0; r < experts * rows; ++r) {
    std::byte* row = bytes->data() + r * ref.row_stride;
    if (has_encoder(type)) {
      const auto values = gaussian(cols, static_cast<unsigned>(random()), 0.05F);
      quantize_row(type, values.data(), row, cols);
    } else {
      for (std::int64_t i = 0; i < ref.row_stride; ++i) row[i] = static_cast<std::byte>(random());
      for (std::int64_t i = 0; i < ref.row_stride; i += facts.block_bytes) {
        sane_scales(type, row + i, random);
      }
    }
  }
  ref.base = bytes->data();
  out.owner = bytes;
  return out;
}

RoleWeights repack(const RoleWeights& weights, ThreadPool* pool = nullptr) {
  ExpertStack::Parts parts;
  parts.up = weights;
  LoadOptions options;
  options.pool = pool;
  cpu::CpuBackend().prepare(parts, options);
  return parts.up;
}

std::vector<float> dequantized(const WeightRef& ref, std::int32_t expert) {
  std::vector<float> out(static_cast<std::size_t>(ref.rows * ref.cols));
  for (std::int64_t r = 0; r < ref.rows; ++r) {
    dequantize_expert_row(ref, expert, r, out.data() + r * ref.cols);
  }
  return out;
}

Tuning tuning_of(CpuIsa isa) {
  Tuning tuning;
  tuning.cpu_isa = isa;
  return tuning;
}

Context make_context(CpuIsa isa, int threads = 1) {
  return Context(backend_for(Device{}), tuning_of(isa), std::make_shared<ThreadPool>(threads));
}

InputRows dense(const std::vector<float>& x, std::int64_t cols) {
  InputRows in;
  in.data = x.data();
  in.num_rows = static_cast<std::int64_t>(x.size()) / cols;
  in.cols = cols;
  in.outer_stride = cols;
  return in;
}

/// Scratch that is exactly as large as asked for, between guard bytes.
class Scratch {
 public:
  Scratch(std::int32_t experts, std::int64_t rows, std::int64_t cols, std::int64_t pairs)
      : bytes_(cpu::CpuBackend().scratch_bytes({{experts, cols, rows}, pairs, 1, pairs})),
        memory_(bytes_ + 128, std::byte{0xff}) {}
  std::byte* data() {
    auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    return reinterpret_cast<std::byte*>((address + 63) / 64 * 64);
  }
  bool intact() {
    for (std::byte* p = data() + bytes_; p < memory_.data() + memory_.size(); ++p) {
      if (*p != std::byte{0xff}) return false;
    }
    return true;
  }

 private:
  std::size_t bytes_;
  std::vector<std::byte> memory_;
};

/// T tokens through expert 0 .. E - 1 in turn: token t to expert t % E.
std::vector<float> multiply(Context& context, const RoleWeights& weights,
                            const std::vector<float>& x, Precision precision,
                            std::int32_t only_expert = -1) {
  const WeightRef& ref = weights.ref;
  const auto tokens = static_cast<std::int32_t>(static_cast<std::int64_t>(x.size()) / ref.cols);
  std::vector<std::int32_t> expert(static_cast<std::size_t>(tokens));
  for (std::int32_t t = 0; t < tokens; ++t) {
    expert[static_cast<std::size_t>(t)] = only_expert >= 0 ? only_expert : t % ref.num_experts;
  }
  std::vector<float> out(static_cast<std::size_t>(tokens * ref.rows),
                         std::numeric_limits<float>::quiet_NaN());
  Scratch scratch(ref.num_experts, ref.rows, ref.cols, tokens);
  op::Gemm call;
  call.weight = weights.view();
  call.map = {.num_segments = tokens, .expert = expert.data(), .limit = tokens};
  call.in = dense(x, ref.cols);
  call.out = out.data();
  call.precision = precision;
  call.scratch = scratch.data();
  cpu::CpuBackend().expert_gemm(context, call);
  EXPECT_TRUE(scratch.intact());
  return out;
}

double relative_error(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

std::vector<double> as_double(const std::vector<float>& v) { return {v.begin(), v.end()}; }

/// y = W x in f64.
std::vector<double> oracle(const WeightRef& ref, const std::vector<float>& x) {
  const auto tokens = static_cast<std::int64_t>(x.size()) / ref.cols;
  std::vector<std::vector<float>> w;
  for (std::int32_t e = 0; e < ref.num_experts; ++e) w.push_back(dequantized(ref, e));
  std::vector<double> out;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto& we = w[static_cast<std::size_t>(t % ref.num_experts)];
    for (std::int64_t r = 0; r < ref.rows; ++r) {
      double sum = 0;
      for (std::int64_t k = 0; k < ref.cols; ++k) {
        sum += static_cast<double>(we[static_cast<std::size_t>(r * ref.cols + k)]) *
               x[static_cast<std::size_t>(t * ref.cols + k)];
      }
      out.push_back(sum);
    }
  }
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class EveryFormat : public ::testing::TestWithParam<QuantType> {
 protected:
  /// 3 blocks or so, not a multiple of 256 where the format allows it.
  std::int64_t cols() const {
    const int block = traits(GetParam()).block_elems;
    return block == 256 ? 768 : block == 1 ? 301 : block == 128 ? 384 : 704;
  }
};

std::string type_name(const ::testing::TestParamInfo<QuantType>& info) {
  return std::string(traits(info.param).name);
}
INSTANTIATE_TEST_SUITE_P(Types, EveryFormat, ::testing::ValuesIn(kTypes), type_name);

TEST_P(EveryFormat, PanelsGiveBackEveryBit) {
  for (const std::int64_t rows : {1, 16, 37}) {
    const RoleWeights weights = make_weights(GetParam(), 2, rows, cols(), 1);
    ThreadPool pool(2);
    const RoleWeights packed = repack(weights, &pool);
    ASSERT_EQ(packed.ref.layout, WeightLayout::Panels);
    std::vector<std::byte> row(static_cast<std::size_t>(weights.ref.row_stride), std::byte{0xee});
    for (std::int32_t e = 0; e < 2; ++e) {
      for (std::int64_t r = 0; r < rows; ++r) {
        cpu::panel_row(packed.ref, e, r, row.data());
        ASSERT_EQ(0, std::memcmp(row.data(), weights.ref.expert(e) + r * weights.ref.row_stride,
                                 row.size()))
            << "expert " << e << " row " << r;
      }
    }
  }
}

TEST_P(EveryFormat, MeetsF64) {
  const RoleWeights weights = repack(make_weights(GetParam(), 2, 40, cols(), 2));
  const auto x = gaussian(6 * cols(), 3);
  const auto want = oracle(weights.ref, x);
  for (const CpuIsa isa : cpu::supported_isas()) {
    Context context = make_context(isa);
    const double exact = relative_error(multiply(context, weights, x, Precision::Exact), want);
    const double fast = relative_error(multiply(context, weights, x, Precision::Fast), want);
    EXPECT_LT(exact, 5e-5) << cpu::name_of(isa);
    EXPECT_LT(fast, is_float(GetParam()) ? 5e-6 : 8e-3) << cpu::name_of(isa);
  }
}

TEST_P(EveryFormat, EveryTokenCountGivesTheSameBitsAndMeetsTheScalarTwin) {
  const RoleWeights weights = make_weights(GetParam(), 1, 35, cols(), 4);
  const RoleWeights packed = repack(weights);
  const auto x = gaussian(17 * cols(), 5);
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    Context twin = make_context(CpuIsa::Scalar);
    const auto want = multiply(twin, packed, x, precision);
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = make_context(isa);
      const auto all = multiply(context, packed, x, precision);
      // Integers are the same; f32 rounding of at most a few hundred additions is not.
      EXPECT_LT(relative_error(all, as_double(want)), 1e-6) << cpu::name_of(isa);
      for (std::int64_t tokens = 1; tokens <= 16; ++tokens) {
        const std::vector<float> some(x.begin(), x.begin() + tokens * cols());
        const std::vector<float> expected(all.begin(), all.begin() + tokens * 35);
        ASSERT_TRUE(same_bits(multiply(context, packed, some, precision), expected))
            << cpu::name_of(isa) << " tokens " << tokens;
        if (isa == CpuIsa::Scalar && tokens >= 3) break;
      }
      const std::vector<float> few(x.begin(), x.begin() + 3 * cols());
      ASSERT_TRUE(same_bits(multiply(context, weights, few, precision),
                            multiply(context, packed, few, precision)))
          << "rows against panels, " << cpu::name_of(isa);
      ASSERT_TRUE(same_bits(multiply(context, weights, x, precision), all))
          << "rows against panels, " << cpu::name_of(isa);
    }
  }
}

TEST_P(EveryFormat, FmaInstructionSetsAgreeBitForBit) {
  const RoleWeights packed = repack(make_weights(GetParam(), 1, 32, cols(), 6));
  const auto x = gaussian(9 * cols(), 7);
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    std::vector<float> first;
    for (const CpuIsa isa : cpu::supported_isas()) {
      if (isa == CpuIsa::Scalar) continue;
      Context context = make_context(isa);
      const auto y = multiply(context, packed, x, precision);
      if (first.empty()) first = y;
      EXPECT_TRUE(same_bits(first, y)) << cpu::name_of(isa);
    }
  }
}

TEST(CpuKernels, ListsEveryFormatAndNamesTheForcedOne) {
  const auto list = cpu::CpuBackend().kernels();
  // In panels and in rows, and INT4 groups in panels.
  EXPECT_EQ(list.size(), (2 * std::size(kTypes) + 1) * cpu::supported_isas().size());
  const RoleWeights packed = repack(make_weights(QuantType::Q4_K, 1, 16, 256, 1));
  for (const CpuIsa isa : cpu::supported_isas()) {
    EXPECT_EQ(cpu::CpuBackend().kernel_name(packed.ref, tuning_of(isa)),
              std::string("gemm_q4_k_") + cpu::name_of(isa));
  }
}

TEST(CpuKernels, ExtremeActivations) {
  // The largest low plane is -128; wide weights times it must not saturate anywhere.
  for (const QuantType type :
       {QuantType::Q8_0, QuantType::IQ4_NL, QuantType::Q6_K, QuantType::Q4_K}) {
    const RoleWeights packed = repack(make_weights(type, 1, 32, 512, 8));
    std::vector<float> x(512);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = i % 32 == 0 ? 32639.0F : i % 2 == 0 ? -32640.0F + 1.0F : -128.0F;
    }
    const auto want = oracle(packed.ref, x);
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = make_context(isa);
      EXPECT_LT(relative_error(multiply(context, packed, x, Precision::Exact), want), 1e-5)
          << cpu::name_of(isa) << " " << traits(type).name;
    }
  }
}

TEST(CpuKernels, NonFiniteTokensStayAlone) {
  const RoleWeights packed = repack(make_weights(QuantType::Q4_K, 1, 32, 256, 9));
  const auto clean = gaussian(8 * 256, 10);
  for (const CpuIsa isa : cpu::supported_isas()) {
    Context context = make_context(isa);
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      const auto want = multiply(context, packed, clean, precision);
      auto x = clean;
      x[2 * 256 + 17] = std::numeric_limits<float>::quiet_NaN();
      x[5 * 256 + 200] = -std::numeric_limits<float>::infinity();
      x[6 * 256] = std::numeric_limits<float>::max();
      std::fill(x.begin() + 7 * 256, x.end(), 1e-38F);
      const auto got = multiply(context, packed, x, precision);
      for (std::size_t t = 0; t < 8; ++t) {
        for (std::size_t r = 0; r < 32; ++r) {
          const float y = got[t * 32 + r];
          if (t == 2 || t == 5) {
            EXPECT_TRUE(std::isnan(y));
          } else if (t == 6 || t == 7) {
            EXPECT_FALSE(std::isnan(y));
          } else {
            EXPECT_EQ(y, want[t * 32 + r]);
          }
        }
      }
    }
  }
}

TEST(CpuKernels, SourcesOfTwoBytesAndStrides) {
  const std::int64_t cols = 320;
  const RoleWeights packed = repack(make_weights(QuantType::Q8_0, 2, 24, cols, 11));
  for (const CpuIsa isa : cpu::supported_isas()) {
    Context context = make_context(isa);
    for (const DType dtype : {DType::F16, DType::BF16}) {
      const std::int64_t stride = cols + 7;
      std::vector<std::uint16_t> x(static_cast<std::size_t>(4 * stride));
      std::vector<float> wide;
      const auto values = gaussian(4 * stride, 12);
      for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = dtype == DType::F16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
        if (static_cast<std::int64_t>(i) % stride < cols) {
          wide.push_back(dtype == DType::F16 ? f16_to_f32(x[i]) : bf16_to_f32(x[i]));
        }
      }
      const auto want = multiply(context, packed, wide, Precision::Exact);
      std::vector<float> got(want.size(), std::numeric_limits<float>::quiet_NaN());
      Scratch scratch(2, 24, cols, 4);
      const std::int32_t expert[] = {0, 1, 0, 1};
      op::Gemm call;
      call.weight = packed.view();
      call.map = {.num_segments = 4, .expert = expert, .limit = 4};
      call.in = {.data = x.data(),
                 .dtype = dtype,
                 .num_rows = 4,
                 .cols = cols,
                 .inner_count = 1,
                 .outer_stride = stride,
                 .inner_stride = 0};
      call.out = got.data();
      call.scratch = scratch.data();
      cpu::CpuBackend().expert_gemm(context, call);
      EXPECT_TRUE(same_bits(got, want)) << cpu::name_of(isa);
    }
  }
}

TEST(CpuKernels, AbortedRepackThrows) {
  ExpertStack::Parts parts;
  parts.up = make_weights(QuantType::Q4_0, 2, 32, 64, 1);
  LoadOptions options;
  std::int64_t reported = 0;
  options.progress = [&](const Progress& p) {
    reported = p.done_bytes;
    return false;
  };
  EXPECT_THROW(cpu::CpuBackend().prepare(parts, options), OperationCancelled);
  EXPECT_GT(reported, 0);
}

// ---- Phases -------------------------------------------------------------------------------------

struct Layer {
  std::shared_ptr<ExpertStack> stack;
  std::int64_t hidden, intermediate;
  std::int32_t experts;
};

Layer make_layer(QuantType gate, QuantType up, QuantType down, std::int32_t experts,
                 std::int64_t hidden, std::int64_t intermediate, bool packed, bool gated = true,
                 bool epilogue = false) {
  ExpertStack::Parts parts;
  parts.shape = {experts, hidden, intermediate};
  if (gated) parts.gate = make_weights(gate, experts, intermediate, hidden, 21);
  parts.up = make_weights(up, experts, intermediate, hidden, 22);
  parts.down = make_weights(down, experts, hidden, intermediate, 23);
  if (epilogue) {
    for (RoleWeights* role : {&parts.gate, &parts.up, &parts.down}) {
      if (!role->ref) continue;
      role->bias = std::make_shared<std::vector<float>>(
          gaussian(experts * role->ref.rows, static_cast<unsigned>(role->ref.rows)));
      std::vector<float> scale;
      for (std::int32_t e = 0; e < experts; ++e) scale.push_back(0.5F + static_cast<float>(e));
      role->scale = std::make_shared<std::vector<float>>(scale);
    }
  }
  LoadOptions options;
  if (!packed) options.layout = StackLayout::File;
  cpu::CpuBackend().prepare(parts, options);
  return {std::make_shared<ExpertStack>(std::move(parts)), hidden, intermediate, experts};
}

struct Pairs {
  std::int64_t tokens;
  std::int32_t top_k;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  RoutingView view() { return {ids.data(), weights.data(), tokens, top_k}; }
};

Pairs random_pairs(std::int64_t tokens, std::int32_t top_k, std::int32_t experts, bool skips,
                   unsigned seed) {
  Pairs out{tokens, top_k, {}, {}};
  std::mt19937 random(seed);
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<std::int32_t> all(static_cast<std::size_t>(experts));
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    for (std::int32_t s = 0; s < top_k; ++s) {
      const bool skip = skips && random() % 4 == 0;
      out.ids.push_back(skip ? -1 : all[static_cast<std::size_t>(s)]);
      out.weights.push_back(static_cast<float>(random() % 1000) / 1000.0F);
    }
  }
  return out;
}

struct Maps {
  std::vector<std::int32_t> offsets, expert, source, destination;
  RowMap gate_up, down;
};

enum class Form { Pairs, Buckets, Blocks };

/// Row maps of both phases over the pairs, destinations in pair order.
Maps make_maps(const Pairs& pairs, std::int32_t experts, Form form) {
  Maps m;
  const auto count = static_cast<std::int32_t>(pairs.ids.size());
  if (form == Form::Pairs) {
    m.expert = pairs.ids;
    m.gate_up = {.num_segments = count, .expert = nullptr, .limit = count};
    m.gate_up.expert = m.expert.data();
    m.down = m.gate_up;
    m.gate_up.source_divisor = pairs.top_k;
    return m;
  }
  constexpr std::int32_t kBlock = 8;
  m.offsets.push_back(0);
  for (std::int32_t e = 0; e < experts; ++e) {
    for (std::int32_t p = 0; p < count; ++p) {
      if (pairs.ids[static_cast<std::size_t>(p)] == e) m.destination.push_back(p);
    }
    if (form == Form::Blocks) {
      while (m.destination.size() % kBlock != 0) m.destination.push_back(count);
      while (m.expert.size() * kBlock < m.destination.size()) m.expert.push_back(e);
    }
    m.offsets.push_back(static_cast<std::int32_t>(m.destination.size()));
  }
  if (form == Form::Blocks) {
    m.expert.push_back(-1);  // behind the last block
    m.destination.resize(m.expert.size() * kBlock, count);
    m.gate_up = {.num_segments = static_cast<std::int32_t>(m.expert.size()), .width = kBlock};
  } else {
    m.gate_up = {.num_segments = experts};
  }
  m.source = m.destination;
  m.gate_up.limit = count;
  m.gate_up.source_divisor = pairs.top_k;
  m.gate_up.expert = m.expert.empty() ? nullptr : m.expert.data();
  m.gate_up.offsets = form == Form::Buckets ? m.offsets.data() : nullptr;
  m.gate_up.source = m.source.data();
  m.gate_up.destination = m.destination.data();
  m.down = m.gate_up;
  m.down.source_divisor = 1;
  return m;
}

/// A whole layer through gate_up and down.
std::vector<float> run_layer(Context& context, const Layer& layer, const Activation& activation,
                             const std::vector<float>& x, Pairs pairs, Form form,
                             Precision precision) {
  const auto count = static_cast<std::int64_t>(pairs.ids.size());
  Maps maps = make_maps(pairs, layer.experts, form);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> hidden(static_cast<std::size_t>(count * layer.intermediate), nan);
  std::vector<float> rows(static_cast<std::size_t>(count * layer.hidden), nan);
  std::vector<float> out(static_cast<std::size_t>(pairs.tokens * layer.hidden), nan);
  Scratch scratch(layer.experts, layer.intermediate, layer.hidden, count);
  op::GateUp gate_up;
  gate_up.gate = layer.stack->gate().view();
  gate_up.up = layer.stack->up().view();
  gate_up.activation = activation;
  gate_up.map = maps.gate_up;
  gate_up.in = dense(x, layer.hidden);
  gate_up.hidden = hidden.data();
  gate_up.precision = precision;
  gate_up.scratch = scratch.data();
  cpu::CpuBackend().gate_up(context, gate_up);
  EXPECT_TRUE(scratch.intact());
  op::Down down;
  down.weight = layer.stack->down().view();
  down.map = maps.down;
  down.in = dense(hidden, layer.intermediate);
  down.rows = rows.data();
  down.combine.rows = rows.data();
  down.combine.routing = pairs.view();
  down.combine.out = {
      .data = out.data(), .dtype = DType::F32, .cols = layer.hidden, .stride = layer.hidden};
  down.precision = precision;
  down.scratch = scratch.data();
  cpu::CpuBackend().down(context, down);
  EXPECT_TRUE(scratch.intact());
  return out;
}

std::vector<double> layer_oracle(const Layer& layer, const Activation& activation,
                                 const std::vector<float>& x, const Pairs& pairs) {
  std::vector<double> out(static_cast<std::size_t>(pairs.tokens * layer.hidden), 0.0);
  const auto product = [&](const RoleWeights& role, std::int32_t e, const std::vector<double>& in) {
    const auto w = dequantized(role.ref, e);
    std::vector<double> y;
    for (std::int64_t r = 0; r < role.ref.rows; ++r) {
      double sum = 0;
      for (std::int64_t k = 0; k < role.ref.cols; ++k) {
        sum += static_cast<double>(w[static_cast<std::size_t>(r * role.ref.cols + k)]) *
               in[static_cast<std::size_t>(k)];
      }
      if (role.scale) sum *= (*role.scale)[static_cast<std::size_t>(e)];
      if (role.bias) sum += (*role.bias)[static_cast<std::size_t>(e * role.ref.rows + r)];
      y.push_back(sum);
    }
    return y;
  };
  for (std::int64_t t = 0; t < pairs.tokens; ++t) {
    const std::vector<double> in(x.begin() + t * layer.hidden, x.begin() + (t + 1) * layer.hidden);
    for (std::int32_t s = 0; s < pairs.top_k; ++s) {
      const auto pair = static_cast<std::size_t>(t * pairs.top_k + s);
      const std::int32_t e = pairs.ids[pair];
      if (e < 0) continue;
      const auto up = product(layer.stack->up(), e, in);
      auto h = up;
      const auto gate = layer.stack->gated() ? product(layer.stack->gate(), e, in) : up;
      for (std::size_t i = 0; i < h.size(); ++i) {
        h[i] = activate(activation, static_cast<float>(gate[i]), static_cast<float>(up[i]));
      }
      const auto y = product(layer.stack->down(), e, h);
      for (std::size_t i = 0; i < y.size(); ++i) {
        out[static_cast<std::size_t>(t * layer.hidden) + i] += pairs.weights[pair] * y[i];
      }
    }
  }
  return out;
}

TEST(CpuLayer, FormsThreadsAndLayoutsGiveTheSameBits) {
  const auto packed =
      make_layer(QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K, 5, 512, 256, true);
  const auto rows =
      make_layer(QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K, 5, 512, 256, false);
  for (const std::int64_t tokens : {1, 7, 80}) {
    const auto x = gaussian(tokens * 512, 31);
    for (const bool skips : {false, true}) {
      const Pairs pairs = random_pairs(tokens, 3, 5, skips, 32);
      for (const Precision precision : {Precision::Exact, Precision::Fast}) {
        std::vector<float> first;
        for (const CpuIsa isa : cpu::supported_isas()) {
          if (isa == CpuIsa::Scalar) continue;
          for (const int threads : {1, 2, 5}) {
            Context context = make_context(isa, threads);
            for (const Form form : {Form::Pairs, Form::Buckets, Form::Blocks}) {
              for (const Layer* layer : {&packed, &rows}) {
                const auto y = run_layer(context, *layer, {}, x, pairs, form, precision);
                if (first.empty()) {
                  first = y;
                  const auto want = layer_oracle(packed, {}, x, pairs);
                  EXPECT_LT(relative_error(y, want), precision == Precision::Exact ? 1e-4 : 1.3e-2);
                }
                ASSERT_TRUE(same_bits(first, y))
                    << cpu::name_of(isa) << " tokens " << tokens << " threads " << threads
                    << " form " << static_cast<int>(form) << " packed " << (layer == &packed);
              }
            }
          }
        }
      }
    }
  }
}

TEST(CpuLayer, ATokenDoesNotDependOnItsBatch) {
  const auto layer =
      make_layer(QuantType::Q4_K, QuantType::Q5_K, QuantType::Q6_K, 4, 256, 256, true);
  const auto x = gaussian(90 * 256, 41);
  const Pairs pairs = random_pairs(90, 2, 4, false, 42);
  Context context = make_context(CpuIsa::Auto, 2);
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    const auto all = run_layer(context, layer, {}, x, pairs, Form::Buckets, precision);
    for (std::int64_t t = 0; t < 90; t += 7) {
      const Pairs one{1,
                      2,
                      {pairs.ids.begin() + 2 * t, pairs.ids.begin() + 2 * t + 2},
                      {pairs.weights.begin() + 2 * t, pairs.weights.begin() + 2 * t + 2}};
      const std::vector<float> row(x.begin() + 256 * t, x.begin() + 256 * (t + 1));
      const auto y = run_layer(context, layer, {}, row, one, Form::Pairs, precision);
      EXPECT_TRUE(same_bits(y, {all.begin() + 256 * t, all.begin() + 256 * (t + 1)})) << t;
    }
  }
}

TEST(CpuLayer, EveryActivationWithBiasAndScale) {
  for (const ActivationKind kind :
       {ActivationKind::SwiGlu, ActivationKind::SwiGluClampInput, ActivationKind::SwiGluClampOutput,
        ActivationKind::SwiGluOai, ActivationKind::GeGluTanh, ActivationKind::ReGlu,
        ActivationKind::GeluTanh, ActivationKind::ReluSquared, ActivationKind::SiTu}) {
    const Activation activation{.kind = kind};
    const auto layer = make_layer(QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4, 3, 96, 160,
                                  true, activation.gated(), true);
    const auto x = gaussian(5 * 96, 51);
    const Pairs pairs = random_pairs(5, 2, 3, false, 52);
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = make_context(isa);
      const auto y = run_layer(context, layer, activation, x, pairs, Form::Pairs, Precision::Exact);
      EXPECT_LT(relative_error(y, layer_oracle(layer, activation, x, pairs)), 1e-4)
          << name_of(kind) << " " << cpu::name_of(isa);
    }
  }
}

TEST(CpuLayer, OddShapes) {
  struct Case {
    QuantType gate, up, down;
    std::int32_t experts, top_k;
    std::int64_t hidden, intermediate, tokens;
  };
  const Case cases[] = {
      {QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4, 2, 2, 2880, 96, 3},
      {QuantType::Q4_K, QuantType::Q4_K, QuantType::Q5_1, 3, 2, 256, 704, 4},
      {QuantType::Q4_K, QuantType::Q6_K, QuantType::Q8_0, 2, 1, 256, 1408, 9},
      {QuantType::Q4_0, QuantType::F16, QuantType::BF16, 3, 3, 160, 37, 5},  // f32 beside integers
      {QuantType::F32, QuantType::Q5_0, QuantType::F32, 1, 1, 32, 1, 2},
      {QuantType::IQ2_XXS, QuantType::IQ3_S, QuantType::IQ4_NL, 512, 7, 256, 32, 40},
      {QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_1, 1, 1, 64, 64, 200},  // all to one
      {QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_1, 6, 6, 64, 64, 33},   // top_k = E
  };
  for (const Case& c : cases) {
    const auto layer = make_layer(c.gate, c.up, c.down, c.experts, c.hidden, c.intermediate, true);
    const auto x = gaussian(c.tokens * c.hidden, 61);
    const Pairs pairs = random_pairs(c.tokens, c.top_k, c.experts, false, 62);
    const auto want = layer_oracle(layer, {}, x, pairs);
    for (const CpuIsa isa : cpu::supported_isas()) {
      if (isa == CpuIsa::Scalar && c.experts > 100) continue;
      Context context = make_context(isa, 2);
      for (const Form form : {Form::Pairs, Form::Blocks}) {
        const auto y = run_layer(context, layer, {}, x, pairs, form, Precision::Exact);
        EXPECT_LT(relative_error(y, want), 1e-4)
            << cpu::name_of(isa) << " H " << c.hidden << " I " << c.intermediate;
      }
    }
  }
}

TEST(CpuLayer, NoTokensAndOnlySkippedPairs) {
  const auto layer = make_layer(QuantType::Q4_0, QuantType::Q4_0, QuantType::Q4_0, 2, 64, 64, true);
  Context context = make_context(CpuIsa::Auto, 2);
  EXPECT_TRUE(run_layer(context, layer, {}, {}, Pairs{0, 2, {}, {}}, Form::Pairs, Precision::Exact)
                  .empty());
  const Pairs skipped{2, 1, {-1, -1}, {1.0F, 1.0F}};
  const auto y =
      run_layer(context, layer, {}, gaussian(128, 1), skipped, Form::Pairs, Precision::Exact);
  for (const float v : y) EXPECT_EQ(v, 0.0F);
}

TEST(CpuLayer, ExpertsInATableAndBehindASlotMap) {
  const RoleWeights stacked = repack(make_weights(QuantType::Q5_K, 4, 48, 256, 71));
  const auto x = gaussian(8 * 256, 72);
  Context context = make_context(CpuIsa::Auto);
  const auto want = multiply(context, stacked, x, Precision::Exact);
  std::vector<const std::byte*> table;
  for (std::int32_t e : {3, 1, 0, 2}) table.push_back(stacked.ref.expert(e));
  const std::int32_t slots[] = {2, 1, 3, 0};
  RoleWeights scattered = stacked;
  scattered.ref.base = nullptr;
  scattered.ref.table = table.data();
  scattered.ref.slot_map = slots;
  EXPECT_TRUE(same_bits(multiply(context, scattered, x, Precision::Exact), want));
}

}  // namespace
}  // namespace moesaic
