#include <cmath>

#include "cpu/cpu_backend.hpp"
#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

float mean_square(const float* row, std::int64_t count) {
  constexpr std::int64_t kStrands = 16;
  double sum[kStrands] = {};
  std::int64_t i = 0;
  for (; i + kStrands <= count; i += kStrands) {
    for (std::int64_t j = 0; j < kStrands; ++j) {
      const auto v = static_cast<double>(row[i + j]);
      sum[j] += v * v;
    }
  }
  for (; i < count; ++i) sum[0] += static_cast<double>(row[i]) * static_cast<double>(row[i]);
  for (std::int64_t j = 1; j < kStrands; ++j) sum[0] += sum[j];
  return static_cast<float>(sum[0] / static_cast<double>(count));
}

}  // namespace

void CpuBackend::rms_norm(Context& context, const op::RmsNorm& call) const {
  const InputRows& x = call.x;
  constexpr std::int64_t kOperations = 4;
  parallel_ranges(context.pool(), x.num_rows, x.cols * kOperations,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t r = begin; r < end; ++r) {
                      float* const row = call.out + r * x.cols;
                      row_to_f32(x, r, 0, x.cols, row);
                      const float factor = 1.0F / std::sqrt(mean_square(row, x.cols) + call.eps);
                      for (std::int64_t i = 0; i < x.cols; ++i)
                        row[i] = row[i] * factor * call.weight[i];
                    }
                  });
}

}  // namespace moesaic::cpu
