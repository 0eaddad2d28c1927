#include "weights/role_sources.hpp"

#include <cstring>
#include <memory>
#include <utility>

#include "base/pages.hpp"
#include "base/sizes.hpp"
#include "moesaic/interrupt.hpp"
#include "weights/check_codes.hpp"

namespace moesaic::weights {

QuantType dense_type(const char* operation, const char* name, const ConstTensorView& view) {
  switch (view.dtype) {
    case DType::F32:
      return QuantType::F32;
    case DType::F16:
      return QuantType::F16;
    case DType::BF16:
      return QuantType::BF16;
    default:
      break;
  }
  throw DTypeError(Problem{.operation = operation,
                           .what = name,
                           .expected = "f32, f16 or bf16",
                           .got = describe(view),
                           .hint = {}});
}

RoleWeights copy_role(const ConstTensorView& view) {
  const QuantType type = dense_type("load", "weights", view);
  const std::size_t size = size_of(view.dtype);
  RoleWeights weights;
  WeightRef& ref = weights.ref;
  ref.type = type;
  ref.num_experts = static_cast<std::int32_t>(view.dim(0));
  ref.rows = view.dim(1);
  ref.cols = view.dim(2);
  ref.row_stride = row_bytes(type, ref.cols);
  ref.expert_stride = ref.rows * ref.row_stride;
  const std::shared_ptr<std::byte> memory =
      allocate_pages(static_cast<std::size_t>(ref.num_experts * ref.expert_stride));
  const auto* from = static_cast<const std::byte*>(view.data);
  std::byte* to = memory.get();
  for (std::int64_t e = 0; e < ref.num_experts; ++e) {
    for (std::int64_t row = 0; row < ref.rows; ++row, to += ref.row_stride) {
      Interrupt::check();
      const std::byte* source =
          from + (e * view.stride(0) + row * view.stride(1)) * static_cast<std::int64_t>(size);
      if (view.stride(2) == 1 || ref.cols == 1) {
        std::memcpy(to, source, static_cast<std::size_t>(ref.row_stride));
        continue;
      }
      for (std::int64_t col = 0; col < ref.cols; ++col) {
        std::memcpy(to + col * static_cast<std::int64_t>(size),
                    source + col * view.stride(2) * static_cast<std::int64_t>(size), size);
      }
    }
  }
  ref.base = memory.get();
  weights.owner = memory;
  return weights;
}

RoleWeights view_role(const char* operation, const std::string& name,
                      const ExpertStack::EncodedRole& source) {
  const auto problem = [&](const char* what, std::string expected, std::string got) {
    return Problem{.operation = operation,
                   .what = name + what,
                   .expected = std::move(expected),
                   .got = std::move(got),
                   .hint = {}};
  };
  require<ShapeError>(source.num_experts > 0 && source.rows > 0 && source.cols > 0, [&] {
    return problem(".shape", "[E, rows, cols], none of them 0",
                   "[" + std::to_string(source.num_experts) + ", " + std::to_string(source.rows) +
                       ", " + std::to_string(source.cols) + "]");
  });
  RoleWeights weights;
  WeightRef& ref = weights.ref;
  ref.type = source.type;
  ref.num_experts = source.num_experts;
  ref.rows = source.rows;
  ref.cols = source.cols;
  ref.row_stride = row_bytes(source.type, source.cols);
  const auto needed = static_cast<std::size_t>(
      product_of({ref.num_experts, ref.rows, ref.row_stride}, operation, name));
  ref.expert_stride = ref.rows * ref.row_stride;
  require<ShapeError>(source.bytes == needed, [&] {
    return problem("",
                   std::to_string(needed) + " bytes of " + std::string(traits(source.type).name),
                   std::to_string(source.bytes) + " bytes");
  });
  check_codes(operation, name, source.type, {source.data, needed}, source.cols);
  ref.base = source.data;
  weights.owner = source.owner;
  return weights;
}

}  // namespace moesaic::weights
