// Runs a kernel of planted.cuh and compares with what it should compute.
#pragma once

#include <numeric>
#include <vector>

#include "planted.cuh"

namespace moesaic::planted {

template <Mistake kMistake>
bool sum_tree_is_right() {
  constexpr int kBlocks = 4;
  std::vector<float> x(128 * kBlocks), out(kBlocks, -1);
  for (std::size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i % 13);
  dev::launch(sum_tree<kMistake>, dim3(kBlocks), dim3(128), 0, nullptr, x.data(), out.data());
  bool right = true;
  for (int b = 0; b < kBlocks; b++) {
    const auto first = x.begin() + 128 * b;
    right = right && out[b] == std::accumulate(first, first + 128, 0.0f);
  }
  return right;
}

template <Mistake kMistake>
bool staged_reverse_is_right() {
  constexpr int kRuns = 5;
  std::vector<uint32_t> x(256 * kRuns), y(256 * kRuns);
  std::iota(x.begin(), x.end(), 1u);
  dev::launch(staged_reverse<kMistake>, dim3(1), dim3(64), 0, nullptr, x.data(), y.data(), kRuns);
  bool right = true;
  for (int i = 0; i < 256 * kRuns; i++) {
    right = right && y[i] == 2 * x[i / 256 * 256 + 255 - i % 256];
  }
  return right;
}

template <Mistake kMistake>
bool handed_over_is_right() {
  constexpr int kRuns = 9;
  std::vector<float> x(32 * kRuns), y(32 * kRuns, -1);
  std::iota(x.begin(), x.end(), 0.0f);
  dev::launch(handed_over<kMistake>, dim3(1), dim3(64), 0, nullptr, x.data(), y.data(), kRuns);
  bool right = true;
  for (int i = 0; i < 32 * kRuns; i++) right = right && y[i] == x[i / 32 * 32 + 31 - i % 32];
  return right;
}

template <Mistake kMistake>
bool rotate_lanes_is_right() {
  std::vector<float> x(32), y(32, -1);
  std::iota(x.begin(), x.end(), 0.0f);
  dev::launch(rotate_lanes<kMistake>, dim3(1), dim3(32), 0, nullptr, x.data(), y.data());
  bool right = true;
  for (int i = 0; i < 32; i++) right = right && y[i] == x[(i + 8) % 32];
  return right;
}

template <Mistake kMistake>
bool sum_by_last_block_is_right() {
  constexpr unsigned kBlocks = 6;
  std::vector<float> x(32 * kBlocks, 1.0f), partial(32 * kBlocks), out(1, -1);
  unsigned finished = 0;
  dev::launch(sum_by_last_block<kMistake>, dim3(kBlocks), dim3(32), 0, nullptr, x.data(),
              partial.data(), &finished, out.data());
  return out[0] == 32.0f * kBlocks;
}

template <Mistake kMistake>
bool follow_doubled_is_right() {
  constexpr int kBlocks = 3;
  std::vector<float> x(32 * kBlocks, 3.0f), y(32 * kBlocks, -1), z(32 * kBlocks, -1);
  dev::launch(doubled<kMistake>, dim3(kBlocks), dim3(32), 0, nullptr, x.data(), y.data());
  dev::launch_dependent(follow_doubled<kMistake>, dim3(kBlocks), dim3(32), 0, nullptr, x.data(),
                        y.data(), z.data());
  return x == std::vector<float>(32 * kBlocks, 4.0f) && z == std::vector<float>(32 * kBlocks, 7.0f);
}

// What each mistake is planted in.
struct Plant {
  const char* name;
  bool (*is_right)();
  bool (*is_right_without)();
  // Whether the values show it: an unordered read that still happens late enough does not.
  bool shows_in_values;
};

inline constexpr Plant kPlants[] = {
    {"missing_barrier", sum_tree_is_right<Mistake::missing_barrier>,
     sum_tree_is_right<Mistake::none>, true},
    {"warp_synchronous_tail", sum_tree_is_right<Mistake::warp_synchronous_tail>,
     sum_tree_is_right<Mistake::none>, true},
    {"missing_barrier_after_copy_wait",
     staged_reverse_is_right<Mistake::missing_barrier_after_copy_wait>,
     staged_reverse_is_right<Mistake::none>, true},
    {"overwriting_next_stage", staged_reverse_is_right<Mistake::overwriting_next_stage>,
     staged_reverse_is_right<Mistake::none>, true},
    {"missing_mbarrier_wait", handed_over_is_right<Mistake::missing_mbarrier_wait>,
     handed_over_is_right<Mistake::none>, true},
    {"shuffle_as_barrier", rotate_lanes_is_right<Mistake::shuffle_as_barrier>,
     rotate_lanes_is_right<Mistake::none>, false},
    {"last_block_without_fence", sum_by_last_block_is_right<Mistake::last_block_without_fence>,
     sum_by_last_block_is_right<Mistake::none>, false},
    {"read_before_grid_wait", follow_doubled_is_right<Mistake::read_before_grid_wait>,
     follow_doubled_is_right<Mistake::none>, false},
    {"write_before_grid_wait", follow_doubled_is_right<Mistake::write_before_grid_wait>,
     follow_doubled_is_right<Mistake::none>, false},
};

}  // namespace moesaic::planted
