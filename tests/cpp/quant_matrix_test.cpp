// One matrix on its own: every format, number of rows and element type beside f64 on the decoded
// weights and beside the scalar twin, in poisoned memory between guards.

#include "moesaic/quant_matrix.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "count_allocations.hpp"
#include "cpu/isa.hpp"
#include "fake_backend.hpp"
#include "layers.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/interrupt.hpp"
#include "moesaic/quantize.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

constexpr QuantType kTypes[] = {
#define MOESAIC_KERNEL(TYPE, NAME) QuantType::TYPE,
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
};
constexpr std::int64_t kRowCounts[] = {0, 1, 2, 3, 7, 16, 33, 130, 512};
constexpr std::int64_t kN = 37;

bool is_float(QuantType type) {
  return type == QuantType::F32 || type == QuantType::F16 || type == QuantType::BF16 ||
         type == QuantType::E4M3;
}

/// Some blocks, an odd number of them where a type has blocks and of columns where it has none.
std::int64_t odd_cols(QuantType type) {
  const int block = traits(type).block_elems;
  return block == 256 ? 768 : block == 1 ? 301 : block * (block == 32 ? 11 : 5);
}

/// A matrix with what it holds, decoded.
struct TestMatrix {
  TestRole role;
  QuantMatrix matrix;

  TestMatrix(QuantType type, std::int64_t rows, std::int64_t cols, bool epilogue,
             StackLayout layout = StackLayout::Auto, std::uint32_t seed = 1)
      : role(make_role(1, rows, cols, type, seed, epilogue)), matrix(make(role, layout)) {}

  static QuantMatrix make(const TestRole& role, StackLayout layout) {
    LoadOptions options;
    options.backend = &backend_for(Device{});
    options.layout = layout;
    const WeightRef& ref = role.weights.ref;
    return QuantMatrix::from_encoded(
        {ref.type, ref.rows, ref.cols, role.bytes->data(), role.bytes->size(), role.bytes,
         role.weights.scale != nullptr ? role.weights.scale->front() : 1.0F},
        options, role.weights.bias != nullptr ? *role.weights.bias : Floats());
  }

  /// x W^T * scale + bias in f64, for rows of x one behind the other.
  Doubles want(const Floats& x) const {
    const std::int64_t cols = matrix.cols();
    Doubles y;
    for (auto row = x.begin(); row != x.end(); row += cols) {
      const Doubles out = apply_f64(role, 0, Doubles(row, row + cols).data());
      y.insert(y.end(), out.begin(), out.end());
    }
    return y;
  }
};

/// The product in memory of exactly the size it asks for, between guards, into a poisoned result.
Tensor run(Context& context, const QuantMatrix& matrix, const Tensor& x,
           Precision precision = Precision::Exact, DType out = DType::F32) {
  const std::size_t bytes = workspace_bytes(context, matrix, x.rows);
  GuardedMemory memory(bytes);
  Workspace workspace(memory.data(), bytes);
  Tensor y(out, x.rows, matrix.rows());
  multiply(context, matrix, x.view(), y.view(), workspace, precision);
  EXPECT_TRUE(memory.guard_untouched());
  return y;
}

Tensor f32(const Floats& values, std::int64_t cols) {
  return {DType::F32, static_cast<std::int64_t>(values.size()) / cols, cols, values};
}

class EveryMatrix : public ::testing::TestWithParam<QuantType> {};
INSTANTIATE_TEST_SUITE_P(Types, EveryMatrix, ::testing::ValuesIn(kTypes),
                         [](const auto& info) { return std::string(traits(info.param).name); });

TEST_P(EveryMatrix, MeetsF64AndTheScalarTwinForEveryNumberOfRows) {
  const std::int64_t cols = odd_cols(GetParam());
  const TestMatrix test(GetParam(), kN, cols, true);
  const Floats all = random_values(512 * cols, 3);
  const Doubles want = test.want(all);
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    const double bound = precision == Precision::Exact ? 5e-5 : is_float(GetParam()) ? 5e-6 : 8e-3;
    Context twin = cpu_context(CpuIsa::Scalar);
    const Tensor scalar =
        run(twin, test.matrix, f32({all.begin(), all.begin() + 33 * cols}, cols), precision);
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = cpu_context(isa);
      Tensor most(DType::F32, 0, kN);
      for (const std::int64_t rows : kRowCounts) {
        if (isa == CpuIsa::Scalar && rows > 33) break;  // slow, and no other code
        const Tensor y = run(context, test.matrix,
                             f32({all.begin(), all.begin() + rows * cols}, cols), precision);
        const Doubles part(want.begin(), want.begin() + rows * kN);
        ASSERT_LE(rel_l2(y.values(), part), bound) << name_of(isa) << " rows " << rows;
        if (rows <= 33) {
          // The integer sums are equal; the f32 rounding of a few hundred additions is not.
          const Floats few = scalar.values();
          ASSERT_LE(rel_l2(y.values(), Floats(few.begin(), few.begin() + rows * kN)), 1e-6)
              << name_of(isa) << " rows " << rows;
        }
        // A row does not depend on those beside it.
        const std::size_t both = std::min(most.bytes.size(), y.bytes.size());
        ASSERT_TRUE(std::equal(y.bytes.begin(), y.bytes.begin() + both, most.bytes.begin()))
            << name_of(isa) << " rows " << rows;
        most = y;
      }
    }
  }
}

TEST_P(EveryMatrix, RowsAndPanelsGiveTheSameBitsOnAnyNumberOfThreads) {
  const std::int64_t cols = odd_cols(GetParam());
  const TestMatrix panels(GetParam(), kN, cols, false),
      rows(GetParam(), kN, cols, false, StackLayout::File);
  ASSERT_EQ(panels.matrix.weights().ref.layout, WeightLayout::Panels);
  ASSERT_EQ(rows.matrix.weights().ref.layout, WeightLayout::Rows);
  for (const std::int64_t count : {1, 7, 130}) {
    const Tensor x = f32(random_values(count * cols, 4), cols);
    Context one = cpu_context(CpuIsa::Auto, 1);
    const Tensor want = run(one, panels.matrix, x, Precision::Auto);
    for (const int threads : {1, 2, 3, 8}) {
      Context context = cpu_context(CpuIsa::Auto, threads);
      ASSERT_EQ(run(context, panels.matrix, x, Precision::Auto).bytes, want.bytes) << threads;
      ASSERT_EQ(run(context, rows.matrix, x, Precision::Auto).bytes, want.bytes) << threads;
    }
  }
}

TEST_P(EveryMatrix, DecodesAndEncodesTheSameInBothLayouts) {
  const TestMatrix test(GetParam(), kN, odd_cols(GetParam()), false);
  const WeightRef& ref = test.matrix.weights().ref;
  EXPECT_EQ(decode_role(test.matrix.weights()), test.role.decoded);
  std::vector<std::byte> row(static_cast<std::size_t>(row_bytes(ref.type, ref.cols)));
  for (std::int64_t r = 0; r < kN; ++r) {
    encoded_expert_row(ref, 0, r, row.data());
    ASSERT_EQ(0, std::memcmp(row.data(),
                             test.role.bytes->data() + r * static_cast<std::int64_t>(row.size()),
                             row.size()));
  }
  EXPECT_EQ(test.matrix.nbytes(), static_cast<std::int64_t>(test.role.bytes->size()));
}

TEST(QuantMatrix, ReadsAndWritesEveryFloatType) {
  const TestMatrix test(QuantType::Q5_K, kN, 512, true);
  for (const std::int64_t rows : {1, 5, 40}) {
    const Floats values = random_values(rows * 512, 5);
    for (const DType in : {DType::F32, DType::F16, DType::BF16}) {
      const Tensor x(in, rows, 512, values);
      Context context = cpu_context();
      const Tensor y = run(context, test.matrix, x);
      for (const DType out : {DType::F16, DType::BF16}) {
        // The f32 result, rounded once.
        ASSERT_EQ(run(context, test.matrix, x, Precision::Exact, out).bytes,
                  Tensor(out, rows, kN, y.values()).bytes)
            << name_of(in) << " to " << name_of(out);
      }
    }
  }
}

TEST(QuantMatrix, AddsToWhatIsThere) {
  const TestMatrix test(QuantType::Q6_K, kN, 256, true);
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    const Tensor x(DType::F32, 9, 256, random_values(9 * 256, 6));
    const Tensor before(dtype, 9, kN, random_values(9 * kN, 7));
    Context context = cpu_context();
    Tensor y = before;
    Workspace workspace(workspace_bytes(context, test.matrix, 9));
    multiply(context, test.matrix, x.view(), y.view(), workspace, Precision::Exact, true);
    Floats want = run(context, test.matrix, x).values();
    for (std::size_t i = 0; i < want.size(); ++i) want[i] += before.get(i);
    EXPECT_EQ(y.bytes, Tensor(dtype, 9, kN, want).bytes) << name_of(dtype);
  }
}

TEST(QuantMatrix, RowsMayLieAtAnyDistance) {
  const TestMatrix test(QuantType::Q4_K, kN, 256, true);
  const Tensor x(DType::BF16, 12, 256, random_values(12 * 256, 8));
  Context context = cpu_context();
  const Tensor want = run(context, test.matrix, x);
  Workspace workspace(workspace_bytes(context, test.matrix, 12));
  Tensor kept = x;
  TensorView backwards = kept.view();
  backwards.data = kept.bytes.data() + 11 * 256 * 2;
  backwards.strides[0] = -256;
  Tensor wide(DType::F32, 12, 50);
  TensorView out = wide.view();
  out.shape[1] = kN;
  multiply(context, test.matrix, backwards, out, workspace, Precision::Exact);
  for (std::int64_t r = 0; r < 12; ++r) {
    for (std::int64_t c = 0; c < 50; ++c) {
      const float got = wide.get(static_cast<std::size_t>(r * 50 + c));
      if (c < kN) {
        ASSERT_EQ(got, want.get(static_cast<std::size_t>((11 - r) * kN + c)));
      } else {
        ASSERT_TRUE(std::isnan(got)) << "row " << r << ", behind its end";
      }
    }
  }
  // One row that every row of x is, and one row of a result whatever its stride.
  TensorView same = kept.view();
  same.strides[0] = 0;
  multiply(context, test.matrix, same, out, workspace, Precision::Exact);
  EXPECT_EQ(wide.get(0), wide.get(50));
  TensorView single = kept.slice(3, 1);
  single.strides[0] = 0;
  Tensor one(DType::F32, 1, kN);
  TensorView to = one.view();
  to.strides[0] = 0;
  multiply(context, test.matrix, single, to, workspace, Precision::Exact);
  EXPECT_EQ(one.row(0), want.row(3));
}

TEST(QuantMatrix, PrecisionIsThatOfExpertsUnlessAskedFor) {
  const TestMatrix test(QuantType::Q4_K, kN, 512, false);
  Context context = cpu_context();
  for (const std::int64_t rows : {1, 2, 3, 40}) {
    const Tensor x = f32(random_values(rows * 512, 9), 512);
    const Tensor exact = run(context, test.matrix, x, Precision::Exact);
    const Tensor fast = run(context, test.matrix, x, Precision::Fast);
    EXPECT_NE(exact.bytes, fast.bytes);
    EXPECT_EQ(run(context, test.matrix, x, Precision::Auto).bytes,
              rows <= 2 ? exact.bytes : fast.bytes);
    Tuning tuning;
    tuning.batch_invariant = true;
    Context invariant(backend_for(Device{}), tuning, ThreadPool::shared(2));
    EXPECT_EQ(run(invariant, test.matrix, x, Precision::Auto).bytes, exact.bytes);
  }
}

#if defined(MOESAIC_COUNTS_MALLOC)
TEST(QuantMatrix, CallsAllocateNothing) {
  const TestMatrix test(QuantType::Q4_K, kN, 512, true);
  Context context = cpu_context();
  for (const std::int64_t rows : {1, 40}) {
    const Tensor x(DType::BF16, rows, 512, random_values(rows * 512, 9));
    Tensor y(DType::BF16, rows, kN);
    Workspace workspace(workspace_bytes(context, test.matrix, rows));
    const auto run = [&] { multiply(context, test.matrix, x.view(), y.view(), workspace); };
    run();
    EXPECT_EQ(test::count_allocations(run), 0) << rows;
  }
}
#endif

TEST(QuantMatrix, NastyValuesStayInTheirRows) {
  const TestMatrix test(QuantType::Q8_0, kN, 256, true);
  Context context = cpu_context();
  for (const float nasty : {std::numeric_limits<float>::quiet_NaN(),
                            std::numeric_limits<float>::infinity(), 3e38F, -0.0F, 1e-40F}) {
    Floats values = random_values(9 * 256, 10);
    const Tensor want = run(context, test.matrix, f32(values, 256));
    values[4 * 256 + 100] = nasty;
    const Tensor y = run(context, test.matrix, f32(values, 256));
    for (std::int64_t r = 0; r < 9; ++r) {
      if (r == 4) continue;
      EXPECT_EQ(y.row(r), want.row(r)) << nasty;
    }
    const float got = y.get(4 * kN);
    EXPECT_EQ(std::isfinite(got), std::isfinite(nasty)) << nasty << " gives " << got;
  }
}

TEST(QuantMatrix, FromDenseCopiesOrEncodes) {
  const Floats values = random_values(kN * 64, 11);
  const Tensor dense(DType::F32, kN, 64, values);
  const QuantMatrix copy = QuantMatrix::from_dense(dense.view());
  EXPECT_EQ(copy.type(), QuantType::F32);
  EXPECT_EQ(decode_role(copy.weights()), values);
  const Tensor half(DType::F16, kN, 64, values);
  EXPECT_EQ(QuantMatrix::from_dense(half.view()).type(), QuantType::F16);
  // Transposed in memory: the same values, encoded the same.
  Floats turned(values.size());
  for (std::size_t r = 0; r < kN; ++r) {
    for (std::size_t c = 0; c < 64; ++c) turned[c * kN + r] = values[r * 64 + c];
  }
  ConstTensorView columns(turned.data(), DType::F32, {kN, 64});
  columns.strides[0] = 1;
  columns.strides[1] = kN;
  EXPECT_EQ(decode_role(QuantMatrix::from_dense(columns).weights()), values);
  const QuantMatrix coded = QuantMatrix::from_dense(dense.view(), QuantType::Q4_0);
  EXPECT_EQ(decode_role(QuantMatrix::from_dense(columns, QuantType::Q4_0).weights()),
            decode_role(coded.weights()));
  // An importance changes what is stored.
  const Floats importance = random_factors(64, 12);
  Floats squares = importance;
  for (float& v : squares) v = v * v * v * v;
  const QuantMatrix weighted =
      QuantMatrix::from_dense(dense.view(), QuantType::Q4_0, {squares.data(), DType::F32, {64}});
  EXPECT_NE(decode_role(weighted.weights()), decode_role(coded.weights()));
  EXPECT_THROW(
      QuantMatrix::from_dense(dense.view(), std::nullopt, {squares.data(), DType::F32, {64}}),
      UnsupportedError);
}

TEST(QuantMatrix, DequantizeKeepsTheValues) {
  TestMatrix test(QuantType::Q4_K, kN, 256, true);
  LoadOptions options;
  options.backend = &backend_for(Device{});
  options.dequantize = QuantType::F32;
  const QuantMatrix plain = QuantMatrix::from_encoded(
      {QuantType::Q4_K, kN, 256, test.role.bytes->data(), test.role.bytes->size(), test.role.bytes},
      options);
  EXPECT_EQ(plain.type(), QuantType::F32);
  EXPECT_EQ(decode_role(plain.weights()), test.role.decoded);
  options.dequantize = QuantType::Q8_0;
  EXPECT_THROW(
      QuantMatrix::from_dense({test.role.decoded.data(), DType::F32, {kN, 256}}, {}, {}, options),
      UnsupportedError);
}

TEST(QuantMatrix, BadInputIsRefusedAndWritesNothing) {
  const TestMatrix test(QuantType::Q8_0, kN, 64, false);
  Context context = cpu_context();
  Workspace workspace(workspace_bytes(context, test.matrix, 4));
  Tensor x(DType::F32, 4, 64, random_values(4 * 64, 13)), y(DType::F32, 4, kN);
  const auto call = [&](ConstTensorView in, TensorView out) {
    multiply(context, test.matrix, in, out, workspace);
  };
  EXPECT_THROW(call({x.bytes.data(), DType::F32, {4, 63}}, y.view()), ShapeError);
  EXPECT_THROW(call({x.bytes.data(), DType::F32, {256}}, y.view()), ShapeError);
  EXPECT_THROW(call({nullptr, DType::F32, {4, 64}}, y.view()), ShapeError);
  EXPECT_THROW(call({x.bytes.data(), DType::I32, {4, 64}}, y.view()), DTypeError);
  EXPECT_THROW(call({x.bytes.data(), DType::F32, {4, 64}, {DeviceType::Cuda, 0}}, y.view()),
               DeviceError);
  EXPECT_THROW(call(x.view(), y.slice(0, 3)), ShapeError);
  EXPECT_THROW(call(x.view(), {y.bytes.data(), DType::I32, {4, kN}}), DTypeError);
  EXPECT_THROW(call(x.view(), {x.bytes.data(), DType::F32, {4, kN}}), ShapeError);
  TensorView crowded = y.view();
  crowded.strides[0] = kN - 1;
  EXPECT_THROW(call(x.view(), crowded), ShapeError);
  Workspace small(64);
  EXPECT_THROW(multiply(context, test.matrix, x.view(), y.view(), small), WorkspaceError);
  EXPECT_TRUE(std::ranges::all_of(y.values(), [](float v) { return std::isnan(v); }));
  EXPECT_THROW(workspace_bytes(context, test.matrix, -1), ShapeError);
  EXPECT_THROW(workspace_bytes(context, test.matrix, std::int64_t{1} << 30), ShapeError);
  Tensor none(DType::F32, 0, 64), empty(DType::F32, 0, kN);
  EXPECT_NO_THROW(call(none.view(), empty.view()));
}

TEST(QuantMatrix, BadWeightsAreRefused) {
  const std::vector<std::byte> bytes(36 * 4);
  const auto make = [&](QuantType type, std::int64_t rows, std::int64_t cols, std::size_t size,
                        Floats bias = {}) {
    return QuantMatrix::from_encoded({type, rows, cols, bytes.data(), size, nullptr}, {},
                                     std::move(bias));
  };
  EXPECT_NO_THROW(make(QuantType::Q8_0, 4, 32, 4 * 34));
  EXPECT_THROW(make(QuantType::Q8_0, 4, 33, 4 * 34), ShapeError);
  EXPECT_THROW(make(QuantType::Q8_0, 4, 32, 4 * 34 - 1), ShapeError);
  EXPECT_THROW(make(QuantType::Q8_0, 0, 32, 0), ShapeError);
  EXPECT_THROW(make(QuantType::Q8_0, -1, -32, 34), ShapeError);
  EXPECT_THROW(make(QuantType::Q8_0, std::int64_t{1} << 60, 32, 34), ShapeError);
  EXPECT_THROW(make(QuantType::Q8_0, 4, 32, 4 * 34, Floats(3)), ShapeError);
  EXPECT_THROW(make(QuantType::I32, 4, 8, 4 * 32), UnsupportedError);
  EXPECT_THROW(QuantMatrix::from_dense({bytes.data(), DType::F32, {36}}), ShapeError);
  EXPECT_THROW(QuantMatrix::from_dense({bytes.data(), DType::F32, {0, 36}}), ShapeError);
  EXPECT_THROW(QuantMatrix::from_dense({bytes.data(), DType::U8, {4, 36}}), DTypeError);
}

/// A device whose memory is somewhere else.
class Elsewhere : public FakeBackend {
 public:
  DeviceType device_type() const override { return DeviceType::Cuda; }
};

TEST(QuantMatrix, OtherDevicesAreRefusedBeforeAnythingIsLoaded) {
  const Elsewhere backend;
  LoadOptions options;
  options.backend = &backend;
  options.progress = [](const Progress&) -> bool { throw ConfigError("something was loaded"); };
  const TestMatrix test(QuantType::Q8_0, kN, 64, false);
  const auto refused = [](const auto& load) {
    try {
      load();
      ADD_FAILURE() << "loaded";
    } catch (const UnsupportedError& error) {
      EXPECT_EQ(error.problem().expected, "cpu");
      EXPECT_EQ(error.problem().got, "cuda:0");
      EXPECT_NE(error.problem().hint.find("only on the CPU"), std::string::npos);
    }
  };
  const Floats& values = test.role.decoded;
  refused([&] {
    QuantMatrix::from_dense({values.data(), DType::F32, {kN, 64}}, QuantType::Q4_0, {}, options);
  });
  refused([&] {
    QuantMatrix::from_encoded({QuantType::Q8_0, kN, 64, test.role.bytes->data(),
                               test.role.bytes->size(), test.role.bytes},
                              options);
  });
  refused([&] { QuantMatrix::from_gguf(nullptr, "output.weight", {}, options); });
}

TEST(QuantMatrix, ExplainsWhatACallWouldDo) {
  const TestMatrix test(QuantType::Q4_K, kN, 256, false);
  Context context = cpu_context();
  const auto fact = [&](std::int64_t rows, const std::string& name) -> std::string {
    for (const auto& [key, value] : explain(context, test.matrix, rows).facts) {
      if (key == name) return value;
    }
    return {};
  };
  EXPECT_EQ(fact(2, "precision"), "exact");
  EXPECT_EQ(fact(3, "precision"), "fast");
  EXPECT_EQ(fact(1, "type"), "Q4_K");
  EXPECT_EQ(fact(1, "layout"), "panels");
  EXPECT_NE(fact(1, "kernel").find("q4_k"), std::string::npos);
  EXPECT_EQ(fact(5, "weight bytes read"), std::to_string(test.matrix.nbytes()));
  EXPECT_EQ(fact(5, "workspace bytes"), std::to_string(workspace_bytes(context, test.matrix, 5)));
}

}  // namespace
}  // namespace moesaic::testing
