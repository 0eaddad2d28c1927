#include <algorithm>

#include "cpu/cpu_backend.hpp"
#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {

void CpuBackend::gather(Context& context, const op::Gather& call) const {
  const InputRows& x = call.x;
  parallel_ranges(context.pool(), call.rows, x.cols,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t r = begin; r < end; ++r) {
                      float* const to = call.out + r * x.cols;
                      if (call.index[r] < 0) {
                        std::fill_n(to, x.cols, 0.0F);
                      } else {
                        row_to_f32(x, call.index[r], 0, x.cols, to);
                      }
                    }
                  });
}

void CpuBackend::zero_skipped(Context&, const op::ZeroSkipped& call) const {
  for (std::int64_t r = 0; r < call.rows; ++r) {
    if (call.ids[r] < 0) std::fill_n(call.out + r * call.cols, call.cols, 0.0F);
  }
}

}  // namespace moesaic::cpu
