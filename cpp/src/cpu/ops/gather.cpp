#include "cpu/ops/gather.hpp"

#include <algorithm>

#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"

namespace moesaic::cpu {

void gather(ThreadPool& pool, const InputRows& x, const std::int32_t* index, std::int64_t rows,
            float* out) {
  check_float(x.dtype, "gather", "x");
  parallel_ranges(pool, rows, x.cols, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      float* const to = out + r * x.cols;
      if (index[r] < 0) {
        std::fill_n(to, x.cols, 0.0F);
      } else {
        row_to_f32(x, index[r], 0, x.cols, to);
      }
    }
  });
}

}  // namespace moesaic::cpu
