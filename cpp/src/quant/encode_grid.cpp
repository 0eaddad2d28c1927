#include <algorithm>
#include <cmath>
#include <cstring>

#include "quant/block.hpp"
#include "quant/encode.hpp"
#include "quant/grid_search.hpp"
#include "quant/scaled_block.hpp"

// The IQ1 to IQ3 types: 256 weights in sub-blocks, x ~ u * (2 * code + 1) * (level + shift) with a
// scale code per sub-block, and u the block's d times a constant. Levels come in runs of 8 weights,
// whose 8 or two times 4 levels are points of a grid. IQ2 and IQ3 have signs in front of positive
// levels; IQ1 has none, but two shifts to choose from.

namespace moesaic::quant {
namespace {

enum class Signs : std::uint8_t { None, Even, Free };
enum class Shifts : std::uint8_t { None, PerSubBlock, PerRun };

constexpr int kRun = 8;
constexpr float kShift = 0.125f;

/// What one type is made of.
template <class Search>
struct Format {
  const Search& search;
  Signs signs;
  Shifts shifts;
  Starts starts;  ///< of the scale of a sub-block, as for fit_scale
};

/// Codes of one sub-block of `kSub` weights.
template <int kSub, int kPoint>
struct SubCodes {
  int point[kSub / kPoint];
  bool negative_shift[kSub / kRun];
};

/// A sub-block with its signs taken off: `x` has the values that levels stand for.
template <int kSub>
struct SubBlock {
  float x[kSub];
  const float* w;
  std::uint8_t signs[kSub / kRun];

  /// An odd number of signs gives one up where it costs least; that value is below zero here, and
  /// the nearest point gives it a small level.
  void take_signs(const float* values, const float* weights, Signs kind) {
    w = weights;
    for (int run = 0; run < kSub / kRun; ++run) {
      int bits = 0;
      int odd = 0;
      int weakest = 0;
      for (int k = 0; k < kRun; ++k) {
        const int i = kRun * run + k;
        const bool negative = kind != Signs::None && values[i] < 0.0f;
        x[i] = negative ? -values[i] : values[i];
        bits |= (negative ? 1 : 0) << k;
        odd ^= negative ? 1 : 0;
        if (w[i] * x[i] < w[kRun * run + weakest] * x[kRun * run + weakest]) weakest = k;
      }
      if (kind == Signs::Even && odd != 0) {
        bits ^= 1 << weakest;
        x[kRun * run + weakest] = -x[kRun * run + weakest];
      }
      signs[run] = static_cast<std::uint8_t>(bits);
    }
  }
};

template <int kSub, class Search>
struct Fit {
  using Codes = SubCodes<kSub, Search::kPoint>;
  ScaleSums sums;
  Codes codes;
};

/// The best codes for one scale.
template <int kSub, class Search>
Fit<kSub, Search> codes_at(const SubBlock<kSub>& block, const Format<Search>& format, float scale) {
  constexpr int kPoint = Search::kPoint;
  using Codes = typename Fit<kSub, Search>::Codes;
  Codes codes[2];
  float costs[2] = {0.0f, 0.0f};
  const int shifts = format.shifts == Shifts::None ? 1 : 2;
  const float shift_of[2] = {format.shifts == Shifts::None ? 0.0f : kShift, -kShift};
  for (int run = 0; run < kSub / kRun; ++run) {
    float run_costs[2] = {0.0f, 0.0f};
    for (int s = 0; s < shifts; ++s) {
      for (int i = kRun * run; i < kRun * (run + 1); i += kPoint) {
        const auto nearest = format.search.find(block.x + i, block.w + i, scale, shift_of[s]);
        codes[s].point[i / kPoint] = nearest.point;
        run_costs[s] += nearest.cost;
      }
      codes[s].negative_shift[run] = s == 1;
      costs[s] += run_costs[s];
    }
    if (format.shifts == Shifts::PerRun && run_costs[1] < run_costs[0]) {
      codes[0].negative_shift[run] = true;
      for (int i = kRun * run; i < kRun * (run + 1); i += kPoint) {
        codes[0].point[i / kPoint] = codes[1].point[i / kPoint];
      }
    }
  }
  Fit<kSub, Search> fit;
  fit.codes = codes[format.shifts == Shifts::PerSubBlock && costs[1] < costs[0] ? 1 : 0];
  for (int i = 0; i < kSub; ++i) {
    const float shift = shift_of[fit.codes.negative_shift[i / kRun] ? 1 : 0];
    const float level = format.search.level(fit.codes.point[i / kPoint], i % kPoint) + shift;
    const float wr = block.w[i] * level;
    fit.sums.rx += wr * block.x[i];
    fit.sums.rr += wr * level;
  }
  return fit;
}

/// The best scale of a sub-block.
template <int kSub, class Search>
ScaleFit fit_sub_block(const SubBlock<kSub>& block, const Format<Search>& format) {
  const float top = std::fabs(extreme(block.x, kSub));
  if (top == 0.0f) return {0.0f, 0.0f};
  ScaleSums best;
  const auto consider = [&](float scale) {
    const ScaleSums sums = codes_at(block, format, scale).sums;
    const bool better = sums.rx > 0.0f && sums.gain() > best.gain();
    if (better) best = sums;
    return better;
  };
  const Starts& starts = format.starts;
  const float step = (starts.to - starts.from) / static_cast<float>(starts.count - 1);
  for (int n = 0; n < starts.count; ++n) {
    consider(top / (format.search.highest() * (starts.from + step * static_cast<float>(n))));
  }
  // Values that are all alike are best at one level, which may be the lowest.
  if (format.search.lowest() > 0.0f) consider(top / format.search.lowest());
  for (int round = 0; round < kRounds && best.rr > 0.0f && consider(best.scale()); ++round) {
  }
  return {best.scale(), best.rr};
}

/// A whole block with `kScales` scale codes per sub-block.
template <int kSub, int kScales, class Search>
struct GridBlock {
  static constexpr int kSubs = kBlock / kSub;
  static constexpr int kHighest = 2 * kScales - 1;
  using Codes = typename Fit<kSub, Search>::Codes;
  float d;
  int scale[kSubs];
  SubBlock<kSub> sub[kSubs];
  Codes codes[kSubs];

  /// `unit` is u / d.
  GridBlock(const float* x, const float* w, const Format<Search>& format, float unit) {
    float fits[kSubs], weights[kSubs];
    for (int j = 0; j < kSubs; ++j) {
      sub[j].take_signs(x + kSub * j, w + kSub * j, format.signs);
      const ScaleFit fit = fit_sub_block(sub[j], format);
      fits[j] = fit.scale;
      weights[j] = fit.weight;
    }
    constexpr Starts kScaleStarts{0.7f, 1.2f, 16};
    const float u = fit_scale<OddLevels<kHighest>, kSubs>(fits, weights, kScaleStarts).scale;
    std::uint8_t field[2];
    d = store_scale(field, u / unit);
    ScaleSums all;
    for (int j = 0; j < kSubs; ++j) {
      const int middle = nearest_int((fits[j] * inverse(d * unit) - 1.0f) * 0.5f, 0, kScales - 1);
      float best_gain = -std::numeric_limits<float>::infinity();
      ScaleSums best;
      for (int code = std::max(middle - 1, 0); code <= std::min(middle + 1, kScales - 1); ++code) {
        const auto factor = static_cast<float>(2 * code + 1);
        const Fit<kSub, Search> fit = codes_at(sub[j], format, d * unit * factor);
        const float gain = fit.sums.gain(d * unit * factor);
        if (!(gain > best_gain)) continue;
        best_gain = gain;
        best = {fit.sums.rx * factor, fit.sums.rr * factor * factor};
        scale[j] = code;
        codes[j] = fit.codes;
      }
      all.rx += best.rx;
      all.rr += best.rr;
    }
    const float refitted = store_scale(field, all.scale() / unit);
    if (all.gain(refitted * unit) > all.gain(d * unit)) d = refitted;
  }
};

// Never destroyed: where a process ends during a call, threads search on.
const auto& search_iq2xxs() {
  static const auto& search = *new GridSearch<256, 8, 3>(kGridIq2xxs, {8, 25, 43});
  return search;
}
const auto& search_iq2xs() {
  static const auto& search = *new GridSearch<512, 8, 3>(kGridIq2xs, {8, 25, 43});
  return search;
}
const auto& search_iq2s() {
  static const auto& search = *new GridSearch<1024, 8, 3>(kGridIq2s, {8, 25, 43});
  return search;
}
const auto& search_iq3xxs() {
  static const auto& search =
      *new GridSearch<256, 4, 8>(kGridIq3xxs, {4, 12, 20, 28, 36, 44, 52, 62});
  return search;
}
const auto& search_iq3s() {
  static const auto& search = *new GridSearch<512, 4, 8>(kGridIq3s, {1, 3, 5, 7, 9, 11, 13, 15});
  return search;
}
const auto& search_iq1() {
  static const auto& search = *new GridSearch<2048, 8, 3>(kGridIq1, {-1, 0, 1});
  return search;
}

constexpr Starts kStarts2{0.8f, 1.6f, 4};
constexpr Starts kStarts3{0.8f, 1.3f, 4};
constexpr Starts kStarts1{1.2f, 2.8f, 5};

inline void store_u32(std::uint8_t* p, std::uint32_t value) {
  store_u16(p, static_cast<std::uint16_t>(value));
  store_u16(p + 2, static_cast<std::uint16_t>(value >> 16));
}

/// Adds bits to a byte that starts at zero.
inline void merge(std::uint8_t& byte, int bits, int shift) {
  byte = static_cast<std::uint8_t>(byte | bits << shift);
}

/// Four times 7 signs of a sub-block of 32, and a scale of 4 bits on top.
template <class Block>
inline std::uint32_t signs_and_scale(const Block& block, int g) {
  std::uint32_t word = static_cast<std::uint32_t>(block.scale[g]) << 28;
  for (int l = 0; l < 4; ++l) {
    word |= static_cast<std::uint32_t>(block.sub[g].signs[l] & 127) << (7 * l);
  }
  return word;
}

}  // namespace

void encode_iq2_xxs(const float* values, const float* importance, std::byte* blocks,
                    std::int64_t elems) {
  const auto& search = search_iq2xxs();
  for_each_block<256, 66>(values, importance, blocks, elems,
                          [&](const float* x, const float* importances, std::uint8_t* b) {
                            const Importance<256> w(importances);
                            const GridBlock<32, 16, GridSearch<256, 8, 3>> block(
                                x, w.w, {search, Signs::Even, Shifts::None, kStarts2}, 0.125f);
                            store_scale(b, block.d);
                            for (int g = 0; g < 8; ++g) {
                              for (int l = 0; l < 4; ++l) {
                                b[2 + 8 * g + l] =
                                    static_cast<std::uint8_t>(block.codes[g].point[l]);
                              }
                              store_u32(b + 6 + 8 * g, signs_and_scale(block, g));
                            }
                          });
}

void encode_iq2_xs(const float* values, const float* importance, std::byte* blocks,
                   std::int64_t elems) {
  const auto& search = search_iq2xs();
  for_each_block<256, 74>(values, importance, blocks, elems,
                          [&](const float* x, const float* importances, std::uint8_t* b) {
                            const Importance<256> w(importances);
                            const GridBlock<16, 16, GridSearch<512, 8, 3>> block(
                                x, w.w, {search, Signs::Even, Shifts::None, kStarts2}, 0.125f);
                            std::fill_n(b, 74, std::uint8_t{0});
                            store_scale(b, block.d);
                            for (int run = 0; run < 32; ++run) {
                              const int code = block.codes[run / 2].point[run % 2] |
                                               (block.sub[run / 2].signs[run % 2] & 127) << 9;
                              store_u16(b + 2 + 2 * run, static_cast<std::uint16_t>(code));
                            }
                            for (int j = 0; j < 16; ++j)
                              merge(b[66 + j / 2], block.scale[j], 4 * (j % 2));
                          });
}

void encode_iq2_s(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  const auto& search = search_iq2s();
  for_each_block<256, 82>(values, importance, blocks, elems,
                          [&](const float* x, const float* importances, std::uint8_t* b) {
                            const Importance<256> w(importances);
                            const GridBlock<16, 16, GridSearch<1024, 8, 3>> block(
                                x, w.w, {search, Signs::Free, Shifts::None, kStarts2}, 0.125f);
                            std::fill_n(b, 82, std::uint8_t{0});
                            store_scale(b, block.d);
                            for (int run = 0; run < 32; ++run) {
                              const int point = block.codes[run / 2].point[run % 2];
                              b[2 + run] = static_cast<std::uint8_t>(point);
                              b[34 + run] = block.sub[run / 2].signs[run % 2];
                              merge(b[66 + run / 4], point >> 8, 2 * (run % 4));
                            }
                            for (int j = 0; j < 16; ++j)
                              merge(b[74 + j / 2], block.scale[j], 4 * (j % 2));
                          });
}

void encode_iq3_xxs(const float* values, const float* importance, std::byte* blocks,
                    std::int64_t elems) {
  const auto& search = search_iq3xxs();
  for_each_block<256, 98>(values, importance, blocks, elems,
                          [&](const float* x, const float* importances, std::uint8_t* b) {
                            const Importance<256> w(importances);
                            const GridBlock<32, 16, GridSearch<256, 4, 8>> block(
                                x, w.w, {search, Signs::Even, Shifts::None, kStarts3}, 0.25f);
                            store_scale(b, block.d);
                            for (int g = 0; g < 8; ++g) {
                              for (int n = 0; n < 8; ++n) {
                                b[2 + 8 * g + n] =
                                    static_cast<std::uint8_t>(block.codes[g].point[n]);
                              }
                              store_u32(b + 66 + 4 * g, signs_and_scale(block, g));
                            }
                          });
}

void encode_iq3_s(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  const auto& search = search_iq3s();
  for_each_block<256, 110>(values, importance, blocks, elems,
                           [&](const float* x, const float* importances, std::uint8_t* b) {
                             const Importance<256> w(importances);
                             const GridBlock<32, 16, GridSearch<512, 4, 8>> block(
                                 x, w.w, {search, Signs::Free, Shifts::None, kStarts3}, 1.0f);
                             std::fill_n(b, 110, std::uint8_t{0});
                             store_scale(b, block.d);
                             for (int g = 0; g < 8; ++g) {
                               for (int n = 0; n < 8; ++n) {
                                 b[2 + 8 * g + n] =
                                     static_cast<std::uint8_t>(block.codes[g].point[n]);
                                 merge(b[66 + g], block.codes[g].point[n] >> 8, n);
                               }
                               std::copy_n(block.sub[g].signs, 4, b + 74 + 4 * g);
                               merge(b[106 + g / 2], block.scale[g], 4 * (g % 2));
                             }
                           });
}

void encode_iq1_s(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  const auto& search = search_iq1();
  for_each_block<256, 50>(values, importance, blocks, elems,
                          [&](const float* x, const float* importances, std::uint8_t* b) {
                            const Importance<256> w(importances);
                            const GridBlock<32, 8, GridSearch<2048, 8, 3>> block(
                                x, w.w, {search, Signs::None, Shifts::PerSubBlock, kStarts1}, 1.0f);
                            store_scale(b, block.d);
                            for (int g = 0; g < 8; ++g) {
                              const auto& codes = block.codes[g];
                              int high =
                                  block.scale[g] << 12 | (codes.negative_shift[0] ? 0x8000 : 0);
                              for (int l = 0; l < 4; ++l) {
                                b[2 + 4 * g + l] = static_cast<std::uint8_t>(codes.point[l]);
                                high |= (codes.point[l] >> 8) << (3 * l);
                              }
                              store_u16(b + 34 + 2 * g, static_cast<std::uint16_t>(high));
                            }
                          });
}

void encode_iq1_m(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  const auto& search = search_iq1();
  for_each_block<256, 56>(values, importance, blocks, elems,
                          [&](const float* x, const float* importances, std::uint8_t* b) {
                            const Importance<256> w(importances);
                            const GridBlock<16, 8, GridSearch<2048, 8, 3>> block(
                                x, w.w, {search, Signs::None, Shifts::PerRun, kStarts1}, 1.0f);
                            std::fill_n(b, 56, std::uint8_t{0});
                            const int d_bits = f32_to_f16(block.d);
                            int scales[4];
                            for (int n = 0; n < 4; ++n) scales[n] = (d_bits >> (4 * n) & 15) << 12;
                            for (int run = 0; run < 32; ++run) {
                              const int point = block.codes[run / 2].point[run % 2];
                              b[run] = static_cast<std::uint8_t>(point);
                              const int negative =
                                  block.codes[run / 2].negative_shift[run % 2] ? 8 : 0;
                              merge(b[32 + run / 2], point >> 8 | negative, 4 * (run % 2));
                            }
                            for (int j = 0; j < 16; ++j)
                              scales[j / 4] |= block.scale[j] << (3 * (j % 4));
                            for (int n = 0; n < 4; ++n)
                              store_u16(b + 48 + 2 * n, static_cast<std::uint16_t>(scales[n]));
                          });
}

}  // namespace moesaic::quant
