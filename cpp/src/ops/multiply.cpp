/// The product with one matrix, by name, and what it would do.

#include <algorithm>
#include <limits>
#include <string>

#include "forward/choose_path.hpp"
#include "moesaic/quant_matrix.hpp"
#include "ops/check_tensor.hpp"
#include "ops/check_workspace.hpp"

namespace moesaic {
namespace {

constexpr const char* kName = "multiply";
constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;

/// Lays out the scratch of a call; over Carver::counting() it only counts.
std::byte* carve(const Context& context, const QuantMatrix& matrix, std::int64_t rows,
                 Carver& carver) {
  // Scratch holds what the product reads, so that the wider a result is, the less it counts.
  const StackShape shape{1, matrix.cols(), matrix.cols()};
  const std::size_t bytes = context.backend().scratch_bytes({shape, rows, 1, rows, 0, true, 0});
  return carver.take<std::byte>(static_cast<std::int64_t>(bytes), "backend");
}

std::string precision_reason(const Tuning& tuning, std::int64_t rows) {
  if (tuning.precision != Precision::Auto || tuning.batch_invariant) {
    return std::string(forward::choose_precision(rows, 1, tuning).reason);
  }
  return rows <= 2 ? "at most two rows: memory is the limit"
                   : "more than two rows: arithmetic is the limit";
}

}  // namespace

std::size_t workspace_bytes(const Context& context, const QuantMatrix& matrix,
                            std::int64_t max_rows) {
  // Activations take 4 bytes an element at most, and half of them twice, in a size of 63 bits.
  const std::int64_t most =
      std::min(kMaxRows, std::numeric_limits<std::int64_t>::max() / 16 / matrix.cols());
  require<ShapeError>(max_rows >= 0 && max_rows < most, [&] {
    return Problem{.operation = "workspace_bytes",
                   .what = "max_rows",
                   .expected = "0 to " + std::to_string(most - 1),
                   .got = std::to_string(max_rows),
                   .hint = {}};
  });
  Carver counter = Carver::counting();
  carve(context, matrix, max_rows, counter);
  return counter.used();
}

void multiply(Context& context, const QuantMatrix& matrix, const ConstTensorView& x, TensorView out,
              Workspace& workspace, Precision precision, bool accumulate) {
  const Backend& backend = context.backend();
  const RoleWeights& weights = matrix.weights();
  if (x.rank != 2 || x.dim(1) != matrix.cols() || x.dim(0) >= kMaxRows) {
    ops::wrong_shape(kName, "x", "[M, " + std::to_string(matrix.cols()) + "], M below 2^30", x);
  }
  const std::int64_t rows = x.dim(0);
  ops::check_input(kName, "x", backend.device(), x);
  ops::check_out(kName, backend.device(), out, rows, matrix.rows());
  ops::check_apart(kName, "x", x, out);
  ops::check_weights(kName, context, "matrix", weights.ref, matrix.device(),
                     "matrices run on the CPU alone");
  if (rows == 0) return;
  const Workspace::Use use(workspace);
  ops::check_workspace(kName, context, workspace, workspace_bytes(context, matrix, rows), rows,
                       "rows");
  Carver carver(workspace.data(), workspace.size());
  backend.linear(context, {.weight = weights.view(),
                           .in = input_rows(x),
                           .out = output_rows(out),
                           .accumulate = accumulate,
                           .precision = forward::decide(precision, rows, 1, context.tuning()),
                           .scratch = carve(context, matrix, rows, carver)});
  backend.submit(context);
  context.throw_kept_error();
}

Explanation explain(const Context& context, const QuantMatrix& matrix, std::int64_t num_rows) {
  const std::size_t scratch = workspace_bytes(context, matrix, num_rows);
  const Tuning& tuning = context.tuning();
  const WeightRef& ref = matrix.weights().ref;
  const Support support = context.backend().supports(ref);
  Explanation explanation;
  auto& facts = explanation.facts;
  facts.emplace_back("backend", context.backend().info().name);
  facts.emplace_back("threads", std::to_string(context.pool().threads()));
  facts.emplace_back("rows", std::to_string(num_rows));
  facts.emplace_back("precision",
                     name_of(forward::choose_precision(num_rows, 1, tuning).precision));
  facts.emplace_back("precision reason", precision_reason(tuning, num_rows));
  facts.emplace_back("type", traits(ref.type).name);
  facts.emplace_back("layout", name_of(ref.layout));
  facts.emplace_back("kernel", support.ok ? context.backend().kernel_name(ref, tuning)
                                          : "unsupported: " + std::string(support.reason));
  if (support.ok && !support.reason.empty()) facts.emplace_back("note", support.reason);
  facts.emplace_back("weight bytes read", std::to_string(num_rows > 0 ? matrix.nbytes() : 0));
  facts.emplace_back("workspace bytes", std::to_string(scratch));
  return explanation;
}

}  // namespace moesaic
