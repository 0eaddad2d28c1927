#include <algorithm>

#include "cpu/role_product.hpp"

namespace moesaic::cpu {

std::size_t CpuBackend::scratch_bytes(const ScratchQuery& query) const {
  const std::int64_t cols =
      std::max({query.shape.hidden_size, query.shape.intermediate_size, query.packed_cols});
  return product_bytes(query.shape.num_experts, query.num_pairs, cols) +
         low_rank_bytes(query.num_pairs, query.low_rank);
}

void CpuBackend::expert_gemm(Context& context, const op::Gemm& call) const {
  role_product(context, call.weight, call.map, call.in, call.precision, call.scratch,
               static_cast<float*>(call.out), call.weight.ref.rows,
               [](int rows, const float* values, float* to) { copy_products(to, values, rows); });
}

}  // namespace moesaic::cpu
