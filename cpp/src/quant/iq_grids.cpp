#include "quant/iq_grids.hpp"

namespace moesaic::quant {
namespace {

/// A point per 16-bit number: K numbers of levels, lowest bits first.
template <std::size_t K, std::size_t N, std::size_t L>
constexpr Grid<N, K> unpack(const std::uint16_t (&packed)[N], const std::int8_t (&levels)[L]) {
  constexpr int kBits = 16 / K;
  Grid<N, K> grid{};
  for (std::size_t n = 0; n < N; ++n) {
    for (std::size_t k = 0; k < K; ++k) {
      grid[n][k] = levels[packed[n] >> (kBits * k) & ((1 << kBits) - 1)];
    }
  }
  return grid;
}

#define MOESAIC_IQ_POINTS(name, count) constexpr std::uint16_t kPacked##name[count]
#include "quant/iq_points.inc"

constexpr std::int8_t kIq2Levels[] = {8, 25, 43};
constexpr std::int8_t kIq3xxsLevels[] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr std::int8_t kIq3sLevels[] = {1, 3, 5, 7, 9, 11, 13, 15};
constexpr std::int8_t kIq1Levels[] = {-1, 0, 1};

}  // namespace

alignas(64) constinit const Grid<256, 8> kGridIq2xxs = unpack<8>(kPackedIq2xxs, kIq2Levels);
alignas(64) constinit const Grid<512, 8> kGridIq2xs = unpack<8>(kPackedIq2xs, kIq2Levels);
alignas(64) constinit const Grid<1024, 8> kGridIq2s = unpack<8>(kPackedIq2s, kIq2Levels);
alignas(64) constinit const Grid<256, 4> kGridIq3xxs = unpack<4>(kPackedIq3xxs, kIq3xxsLevels);
alignas(64) constinit const Grid<512, 4> kGridIq3s = unpack<4>(kPackedIq3s, kIq3sLevels);
alignas(64) constinit const Grid<2048, 8> kGridIq1 = unpack<8>(kPackedIq1, kIq1Levels);

}  // namespace moesaic::quant
