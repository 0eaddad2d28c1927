// Every wrapper of device.cuh against the definition in its manual: the PTX ISA's fragment tables,
// the CUDA manual's shuffles and votes, IEEE roundings.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "device.cuh"
#include "random.hpp"
#include "seeds.hpp"

namespace moesaic {
namespace {

class Wrappers : public ::testing::TestWithParam<uint64_t> {
 protected:
  void SetUp() override { emulation::options().seed = GetParam(); }
  void TearDown() override { emulation::options() = {}; }
};
INSTANTIATE_TEST_SUITE_P(Seeds, Wrappers, ::testing::ValuesIn(emulation::seeds()));

template <class T, class Body>
std::array<T, 32> on_a_warp(Body body) {
  std::array<T, 32> result{};
  emulation::launch(dim3(1), dim3(32), 0, [&] { result[threadIdx.x] = body(threadIdx.x); });
  return result;
}

// The tables of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": element
// i of a lane's fragment, as (row, column).
struct Place {
  int row, column;
};
Place place_in_a(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
  const int column = i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
  return {row, column};
}
Place place_in_b(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8, group};
}
Place place_in_d(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
}

template <class Encode, class Mma>
void check_mma(Encode encode, Mma mma) {
  testing::Random random(5);
  // So small that products and sums are exact.
  const auto small = [&] { return static_cast<float>(random.below(17) - 8); };
  std::array<std::array<float, 16>, 16> a;
  std::array<std::array<float, 8>, 16> b, d;
  for (auto& row : a)
    for (float& v : row) v = small() / 4;
  for (auto& row : b)
    for (float& v : row) v = small() / 8;
  for (auto& row : d)
    for (float& v : row) v = small();
  auto result = d;
  emulation::launch(dim3(1), dim3(32), 0, [&] {
    const int lane = static_cast<int>(threadIdx.x);
    uint16_t a_halves[8], b_halves[4];
    float d_values[4];
    for (int i = 0; i < 8; i++) {
      a_halves[i] = encode(a[place_in_a(lane, i).row][place_in_a(lane, i).column]);
    }
    for (int i = 0; i < 4; i++) {
      b_halves[i] = encode(b[place_in_b(lane, i).row][place_in_b(lane, i).column]);
      d_values[i] = d[place_in_d(lane, i).row][place_in_d(lane, i).column];
    }
    uint32_t a_words[4], b_words[2];
    std::memcpy(a_words, a_halves, sizeof a_words);
    std::memcpy(b_words, b_halves, sizeof b_words);
    mma(d_values, a_words, b_words);
    for (int i = 0; i < 4; i++) {
      result[place_in_d(lane, i).row][place_in_d(lane, i).column] = d_values[i];
    }
  });
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 8; n++) {
      float expected = d[m][n];
      for (int k = 0; k < 16; k++) expected += a[m][k] * b[k][n];
      EXPECT_EQ(result[m][n], expected) << m << "," << n;
    }
  }
}

TEST_P(Wrappers, MmaBf16) {
  check_mma(dev::f32_to_bf16, [](auto& d, auto& a, auto& b) { dev::mma_m16n8k16_bf16(d, a, b); });
}
TEST_P(Wrappers, MmaF16) {
  check_mma(dev::f32_to_f16, [](auto& d, auto& a, auto& b) { dev::mma_m16n8k16_f16(d, a, b); });
}

// The tables of "Matrix Fragments for mma.m16n8k8" in bf16 are the first halves of those above.
TEST_P(Wrappers, MmaOfEightColumns) {
  testing::Random random(7);
  const auto small = [&] { return static_cast<float>(random.below(17) - 8); };
  std::array<std::array<float, 8>, 16> a;
  std::array<std::array<float, 8>, 8> b;
  std::array<std::array<float, 8>, 16> d;
  for (auto& row : a)
    for (float& v : row) v = small() / 4;
  for (auto& row : b)
    for (float& v : row) v = small() / 8;
  for (auto& row : d)
    for (float& v : row) v = small();
  auto result = d;
  emulation::launch(dim3(1), dim3(32), 0, [&] {
    const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, thread = lane % 4;
    const auto pair = [](float low, float high) { return dev::pack_bf16(low, high); };
    const auto row = [&](int r) { return pair(a[r][2 * thread], a[r][2 * thread + 1]); };
    const uint32_t a_words[2] = {row(group), row(group + 8)};
    float d_values[4];
    for (int i = 0; i < 4; i++)
      d_values[i] = d[place_in_d(lane, i).row][place_in_d(lane, i).column];
    dev::mma_m16n8k8_bf16(d_values, a_words, pair(b[2 * thread][group], b[2 * thread + 1][group]));
    for (int i = 0; i < 4; i++) {
      result[place_in_d(lane, i).row][place_in_d(lane, i).column] = d_values[i];
    }
  });
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 8; n++) {
      float expected = d[m][n];
      for (int k = 0; k < 8; k++) expected += a[m][k] * b[k][n];
      EXPECT_EQ(result[m][n], expected) << m << "," << n;
    }
  }
}

// PTX ISA, ldmatrix: lane l receives row l / 4, elements 2 (l % 4) and the next, of each matrix;
// with .trans the matrix is loaded in column-major order.
template <int kMatrices, class Load>
void check_ldmatrix(bool transposed, Load load) {
  emulation::launch(dim3(1), dim3(32), 0, [&] {
    MOESAIC_SHARED(uint16_t, matrix, [kMatrices][8][24]);  // rows 48 bytes apart
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < kMatrices * 64; i += 32) {
      matrix[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i);
    }
    __syncwarp();
    uint32_t words[kMatrices];
    load(words, &matrix[lane / 8 % kMatrices][lane % 8][0]);
    for (int q = 0; q < kMatrices; q++) {
      for (int i = 0; i < 2; i++) {
        const int row = lane / 4, column = 2 * (lane % 4) + i;
        const int expected = 64 * q + (transposed ? 8 * column + row : 8 * row + column);
        EXPECT_EQ(words[q] >> (16 * i) & 0xFFFF, static_cast<uint32_t>(expected));
      }
    }
  });
}

TEST_P(Wrappers, Ldmatrix) {
  check_ldmatrix<2>(false, [](auto& r, const void* p) { dev::ldmatrix_x2(r, p); });
  check_ldmatrix<2>(true, [](auto& r, const void* p) { dev::ldmatrix_x2_trans(r, p); });
  check_ldmatrix<4>(false, [](auto& r, const void* p) { dev::ldmatrix_x4(r, p); });
  check_ldmatrix<4>(true, [](auto& r, const void* p) { dev::ldmatrix_x4_trans(r, p); });
}

TEST_P(Wrappers, Shuffles) {
  const uint32_t all = 0xFFFFFFFFu;
  auto value = [](unsigned lane) { return static_cast<int>(100 + lane); };
  const auto indexed = on_a_warp<int>([&](unsigned l) { return __shfl_sync(all, value(l), 37); });
  const auto segment = on_a_warp<int>([&](unsigned l) { return __shfl_sync(all, value(l), 3, 8); });
  const auto up = on_a_warp<int>([&](unsigned l) { return __shfl_up_sync(all, value(l), 3, 8); });
  const auto down =
      on_a_warp<int>([&](unsigned l) { return __shfl_down_sync(all, value(l), 3, 8); });
  const auto mirrored =
      on_a_warp<int>([&](unsigned l) { return __shfl_xor_sync(all, value(l), 5); });
  const auto wide = on_a_warp<int64_t>(
      [&](unsigned l) { return __shfl_xor_sync(all, int64_t{value(l)} << 40, 16); });
  for (int l = 0; l < 32; l++) {
    EXPECT_EQ(indexed[l], 105);
    EXPECT_EQ(segment[l], 100 + l / 8 * 8 + 3);
    EXPECT_EQ(up[l], 100 + (l % 8 >= 3 ? l - 3 : l));
    EXPECT_EQ(down[l], 100 + (l % 8 + 3 < 8 ? l + 3 : l));
    EXPECT_EQ(mirrored[l], 100 + (l ^ 5));
    EXPECT_EQ(wide[l], int64_t{100 + (l ^ 16)} << 40);
  }
}

TEST_P(Wrappers, VotesMatchesAndReductions) {
  const uint32_t all = 0xFFFFFFFFu;
  auto odd = [](unsigned l) { return l % 2 == 1; };
  const auto ballots = on_a_warp<unsigned>([&](unsigned l) { return __ballot_sync(all, odd(l)); });
  const auto any = on_a_warp<int>([&](unsigned l) { return __any_sync(all, l == 7); });
  const auto none = on_a_warp<int>([&](unsigned l) { return __any_sync(all, l == 77); });
  const auto every = on_a_warp<int>([&](unsigned l) { return __all_sync(all, l < 32); });
  const auto most = on_a_warp<int>([&](unsigned l) { return __all_sync(all, l != 4); });
  const auto same = on_a_warp<unsigned>([&](unsigned l) { return __match_any_sync(all, l % 5); });
  const auto sum =
      on_a_warp<int>([&](unsigned l) { return __reduce_add_sync(all, -static_cast<int>(l)); });
  const auto largest =
      on_a_warp<unsigned>([&](unsigned l) { return __reduce_max_sync(all, l * 7 % 32); });
  const auto lower = on_a_warp<int>([&](unsigned l) {
    return l < 16 ? __reduce_min_sync(0x0000FFFFu, static_cast<int>(l) - 9) : 0;
  });
  for (unsigned l = 0; l < 32; l++) {
    EXPECT_EQ(ballots[l], 0xAAAAAAAAu);
    EXPECT_TRUE(any[l] && !none[l] && every[l] && !most[l]);
    unsigned expected = 0;
    for (unsigned j = 0; j < 32; j++) expected |= (j % 5 == l % 5 ? 1u : 0u) << j;
    EXPECT_EQ(same[l], expected);
    EXPECT_EQ(sum[l], -496);
    EXPECT_EQ(largest[l], 31u);
    EXPECT_EQ(lower[l], l < 16 ? -9 : 0);
  }
}

TEST_P(Wrappers, CopiesLandByTheWait) {
  alignas(16) static const uint32_t source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  emulation::launch(dim3(1), dim3(1), 0, [] {
    MOESAIC_SHARED(uint32_t, tile, [8]);
    dev::cp_async16(tile, source);
    dev::cp_async_commit();
    dev::cp_async16(tile + 4, source + 4);
    dev::cp_async_commit();
    dev::cp_async_wait<1>();
    for (uint32_t i = 0; i < 4; i++) EXPECT_EQ(tile[i], i + 1);
    if (emulation::options().seed == 0) {
      for (int i = 4; i < 8; i++) EXPECT_EQ(tile[i], 0xFFFFFFFFu);
    }
    dev::cp_async_wait<0>();
    for (uint32_t i = 0; i < 8; i++) EXPECT_EQ(tile[i], i + 1);
  });
}

TEST_P(Wrappers, ABarrierCountsCopies) {
  static std::vector<uint32_t> source(4 * 32 * 5);
  for (std::size_t i = 0; i < source.size(); i++) source[i] = static_cast<uint32_t>(3 * i);
  emulation::launch(dim3(1), dim3(64), 0, [] {
    MOESAIC_SHARED(uint32_t, slot, [128]);
    MOESAIC_SHARED(uint64_t, full, [1]);
    MOESAIC_SHARED(uint64_t, empty, [1]);
    if (threadIdx.x == 0) {
      dev::mbarrier_init(full, 32);
      dev::mbarrier_init(empty, 32);
    }
    __syncthreads();
    const unsigned lane = threadIdx.x % 32;
    for (unsigned run = 0; run < 5; run++) {
      if (threadIdx.x < 32) {
        if (run > 0) dev::mbarrier_wait(empty, (run - 1) & 1);
        dev::cp_async16(&slot[4 * lane], &source[128 * run + 4 * lane]);
        dev::mbarrier_arrive_after_copies(full);
      } else {
        dev::mbarrier_wait(full, run & 1);
        for (unsigned i = lane; i < 128; i += 32) EXPECT_EQ(slot[i], 3 * (128 * run + i));
        dev::mbarrier_arrive(empty);
      }
    }
    if (threadIdx.x < 32) {
      dev::cp_async_commit();
      dev::cp_async_wait<0>();
    }
  });
}

MOESAIC_KERNEL void never_loaded() {}
MOESAIC_KERNEL void loaded_before() {}

TEST(Launches, AGraphLoadsNoKernel) {
  dev::load(loaded_before);
  EXPECT_EQ(dev::launch(never_loaded, dim3(1), dim3(1), 0, nullptr), 0);
  const emulation::LoadedOnly as_a_graph;
  EXPECT_EQ(dev::launch(loaded_before, dim3(1), dim3(1), 0, nullptr), 0);
  EXPECT_THROW(dev::launch(never_loaded, dim3(1), dim3(1), 0, nullptr), emulation::Fault);
}

TEST(Scalars, Bits) {
  EXPECT_EQ((dev::lop3 < (0xF0 & 0xCC) | 0xAA > (0x0F0F1234u, 0x00FF00FFu, 0x43004300u)),
            (0x0F0F1234u & 0x00FF00FFu) | 0x43004300u);
  EXPECT_EQ((dev::lop3 < 0xF0 ^ 0xCC ^ 0xAA > (0x12345678u, 0x9ABCDEF0u, 0x0F1E2D3Cu)),
            0x12345678u ^ 0x9ABCDEF0u ^ 0x0F1E2D3Cu);
  EXPECT_EQ(dev::prmt(0x33221100u, 0x77665544u, 0x7531u), 0x77553311u);
  EXPECT_EQ(dev::prmt(0x00800100u, 0, 0xBA98u), 0x00FF0000u);
  EXPECT_EQ(__brev(0x00000013u), 0xC8000000u);
  EXPECT_EQ(__funnelshift_r(0x89ABCDEFu, 0x01234567u, 8), 0x6789ABCDu);
  EXPECT_EQ(__funnelshift_l(0x89ABCDEFu, 0x01234567u, 8), 0x23456789u);
  EXPECT_EQ(__ffs(0), 0);
  EXPECT_EQ(__ffs(8), 4);
  EXPECT_EQ(__clz(1), 31);
}

// All 65536 codes, and roundings checked by distance: no other code is nearer, ties go to even.
template <float (*decode)(uint16_t), uint16_t (*encode)(float)>
void check_conversions(uint16_t largest) {
  for (unsigned code = 0; code < 65536; code++) {
    const auto h = static_cast<uint16_t>(code);
    const float value = decode(h);
    if (value == value) {
      EXPECT_EQ(encode(value), h);
    }
  }
  testing::Random random(3);
  for (uint16_t h = 0; h < largest; h = static_cast<uint16_t>(h + 1 + random.below(7))) {
    const double low = decode(h), high = decode(static_cast<uint16_t>(h + 1));
    const double middle = (low + high) / 2;
    const auto tie = static_cast<float>(middle);
    ASSERT_EQ(static_cast<double>(tie), middle);
    EXPECT_EQ(encode(tie), h % 2 == 0 ? h : h + 1);
    EXPECT_EQ(encode(std::nextafter(tie, 0.0f)), h);
    EXPECT_EQ(encode(std::nextafter(tie, std::numeric_limits<float>::infinity())), h + 1);
    EXPECT_EQ(encode(-tie), 0x8000 | (h % 2 == 0 ? h : h + 1));
  }
  const float nan = decode(encode(std::nanf("")));
  EXPECT_NE(nan, nan);
  EXPECT_EQ(decode(encode(HUGE_VALF)), HUGE_VALF);
  EXPECT_EQ(decode(encode(std::numeric_limits<float>::max())), HUGE_VALF);
}

TEST(Scalars, SixteenBitFloats) {
  check_conversions<dev::bf16_to_f32, dev::f32_to_bf16>(0x7F7F);
  check_conversions<dev::f16_to_f32, dev::f32_to_f16>(0x7BFF);
  EXPECT_EQ(dev::f16_to_f32(0x3C00), 1.0f);
  EXPECT_EQ(dev::f16_to_f32(0x0001), 0x1p-24f);
  EXPECT_EQ(dev::pack_f16(1.0f, -2.0f), 0xC0003C00u);
  EXPECT_EQ(dev::pack_bf16(1.0f, -2.0f), 0xC0003F80u);
}

TEST(Scalars, PairsRoundOnce) {
  // 1 + 2^-7 times itself is 1 + 2^-6 + 2^-14: rounding the product before subtracting 1 + 2^-6
  // would give zero.
  const uint32_t a = dev::pack_bf16(1 + 0x1p-7f, 3.0f);
  const uint32_t b = dev::bf16x2_fma(a, a, dev::pack_bf16(-1 - 0x1p-6f, 1.0f));
  EXPECT_EQ(dev::unpack_bf16(b).x, 0x1p-14f);
  EXPECT_EQ(dev::unpack_bf16(b).y, 10.0f);
  EXPECT_EQ(dev::bf16x2_add(dev::pack_bf16(256.0f, 1.0f), dev::pack_bf16(1.0f, 2.0f)),
            dev::pack_bf16(256.0f, 3.0f));
}

TEST(Scalars, Atomics) {
  int counter = 5;
  EXPECT_EQ(atomicMax(&counter, 9), 5);
  EXPECT_EQ(atomicMin(&counter, 3), 9);
  EXPECT_EQ(atomicCAS(&counter, 3, 8), 3);
  EXPECT_EQ(atomicCAS(&counter, 3, 1), 8);
  EXPECT_EQ(atomicExch(&counter, 2), 8);
  EXPECT_EQ(atomicAdd(&counter, 4), 2);
  EXPECT_EQ(counter, 6);
}

}  // namespace
}  // namespace moesaic
