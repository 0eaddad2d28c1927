/// Feeds the heads of GGUF files to every door of a layer, and runs what opens.
///
/// An input is the head of a file: its metadata and the list of its tensors. Behind it come 256 KiB
/// of noise, which the tensors are read from, so that inputs stay small and a mutation meets what is
/// parsed. The last bytes of the input choose how the layer is opened and called: every input takes
/// one way, and the fuzzer finds the others.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "memory_file.hpp"
#include "moesaic/moesaic.hpp"
#include "random.hpp"

namespace {

using namespace moesaic;

/// Bytes that are moderate numbers in most types, and now and then infinities or NaN in f16.
const std::vector<std::byte>& noise() {
  static const std::vector<std::byte> bytes = [] {
    std::vector<std::byte> made(std::size_t{384} << 10);
    testing::Random random(1);
    for (std::size_t i = 0; i < made.size(); ++i) {
      made[i] = i % 4 == 3 ? std::byte(0x3C + (random.bits() & 0x81U)) : random.byte();
    }
    return made;
  }();
  return bytes;
}

enum class Door : std::uint8_t { Layer, Stack, Store, StoreOnDisk };

/// How an input is opened and called.
struct Way {
  bool mmap;
  Door door;
  StackLayout layout;
  std::optional<QuantType> dequantize;
  std::int64_t tokens;
  DType dtype;
  Tuning tuning;

  explicit Way(std::span<const std::uint8_t> input) {
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < std::min<std::size_t>(input.size(), 3); ++i) {
      bits = bits << 8 | input[input.size() - 1 - i];
    }
    const auto take = [&](std::uint32_t count) {
      const std::uint32_t taken = bits % count;
      bits /= count;
      return taken;
    };
    mmap = take(2) == 0;
    door = static_cast<Door>(take(4));
    layout = static_cast<StackLayout>(take(2));
    constexpr std::int64_t kTokens[] = {1, 2, 5, 40};
    tokens = kTokens[take(4)];
    tuning.gemm = static_cast<GemmMode>(take(3));
    tuning.row_space = static_cast<RowSpaceMode>(take(3));
    tuning.precision = static_cast<Precision>(take(3));
    tuning.cpu_isa = take(2) == 0 ? CpuIsa::Auto : CpuIsa::Scalar;
    dtype = static_cast<DType>(take(3));
    const std::uint32_t decoded = take(8);
    if (decoded == 0) dequantize = QuantType::F32;
    if (decoded == 1) dequantize = QuantType::BF16;
    tuning.threads = 1;
  }
};

template <class Call>
void allow_errors(Call&& call) {
  try {
    call();
  } catch (const Error&) {
  }
}

/// What an output holds before a call: NaNs first, then, where a row still looks so, another value,
/// since weights of a file may be that very NaN, which a product hands on.
constexpr std::uint8_t kPoison[] = {0xFF, 0x5A};

bool is_all(std::span<const std::uint8_t> bytes, std::uint8_t value) {
  return std::ranges::all_of(bytes, [value](std::uint8_t b) { return b == value; });
}

void run(Context& context, const LayerRef& layer, std::int32_t top_k, const Way& way,
         std::span<const std::int32_t> given) {
  const std::int64_t hidden = layer.hidden_size();
  const StackShape& shape = layer.stack->shape();
  std::int64_t tokens = way.tokens;
  // A call that takes minutes teaches no more than a short one.
  if (shape.hidden_size * shape.intermediate_size * top_k * tokens > std::int64_t{1} << 22) {
    tokens = 1;
  }
  const auto count = static_cast<std::size_t>(tokens * hidden);
  std::vector<std::uint16_t> narrow(count);  // as f16 and bf16 these are moderate
  for (std::size_t i = 0; i < count; ++i) {
    narrow[i] = static_cast<std::uint16_t>(0x3C00 + (i * 37 % 251) * 2 + (i % 3 == 0 ? 0x8000 : 0));
  }
  std::vector<float> wide(count);
  for (std::size_t i = 0; i < count; ++i) {
    wide[i] = static_cast<float>(static_cast<int>(i * 37 % 101) - 50) / 25.0F;
  }
  const void* x = way.dtype == DType::F32 ? static_cast<const void*>(wide.data()) : narrow.data();
  std::vector<std::uint8_t> out(count * size_of(way.dtype));
  std::vector<std::int32_t> tokens_given(static_cast<std::size_t>(tokens), 0);
  Routing routing;
  ForwardIo io;
  io.x = ConstTensorView(x, way.dtype, {tokens, hidden});
  io.out = TensorView(out.data(), way.dtype, {tokens, hidden});
  if (layer.separate_router_input) io.router_input = io.x;
  if (!layer.token_experts.empty()) {
    io.token_ids = ConstTensorView(tokens_given.data(), DType::I32, {tokens});
  }
  if (!given.empty()) {
    routing.resize(tokens, top_k);
    for (std::size_t i = 0; i < routing.topk_ids().size(); ++i) {
      routing.topk_ids()[i] = given[i % given.size()];
      routing.topk_weights()[i] = 0.5F;
    }
    io.routing = routing.view();
  }
  const auto call = [&](auto&& forward) {
    std::vector<bool> unwritten(static_cast<std::size_t>(tokens), true);
    const std::size_t row = out.size() / unwritten.size();
    for (const std::uint8_t poison : kPoison) {
      std::ranges::fill(out, poison);
      try {
        forward();
      } catch (const Error&) {
        return;
      }
      if (way.dtype != DType::F32) return;
      for (std::size_t t = 0; t < unwritten.size(); ++t) {
        unwritten[t] = unwritten[t] && is_all(std::span(out).subspan(t * row, row), poison);
      }
      if (std::ranges::find(unwritten, true) == unwritten.end()) return;
    }
    std::abort();
  };
  Workspace workspace(workspace_bytes(context, layer, top_k, tokens));
  call([&] { moe_forward(context, layer, io, workspace); });
  if (layer.residency == nullptr) call([&] { moe_forward_cpu(layer, io); });
  allow_errors([&] { explain(context, layer, top_k, tokens); });
}

/// Sizes at which the inputs of a call stay small; those of the weights are bound by the file.
bool is_small(const MoeConfig& c) {
  return c.hidden_size <= 8192 && c.router.num_experts <= 4096 && c.top_k <= 64;
}

void run_layer(Context& context, const MoeLayer& layer, const Way& way) {
  if (is_small(layer.config())) run(context, layer, layer.config().top_k, way, {});
}

void open_and_run(const std::shared_ptr<GgufFile>& file, std::int32_t number, const Way& way) {
  Context context(Device{}, way.tuning);
  LoadOptions options;
  options.layout = way.layout;
  options.dequantize = way.dequantize;
  options.backend = &context.backend();
  if (way.door == Door::Stack) {
    const ExpertStack stack = ExpertStack::load_from_gguf(file, number, options);
    if (stack.shape().hidden_size > 8192) return;
    const std::int32_t ids[] = {0, stack.num_experts() - 1, -1};
    LayerRef layer;
    layer.stack = &stack;
    if (!stack.gated()) layer.activation.kind = ActivationKind::ReluSquared;
    run(context, layer, 2, way, ids);
  } else {
    run_layer(context, MoeLayer::from_gguf(file, number, options), way);
  }
}

void store_and_run(const std::shared_ptr<GgufFile>& file, const Way& way) {
  Context context(Device{}, way.tuning);
  StoreOptions store_options;
  store_options.io_threads = 1;
  if (way.door == Door::StoreOnDisk) store_options.memory_limit = 1 << 20;
  const auto store = MoeExpertStore::from_gguf(file, store_options);
  LoadOptions options;
  options.backend = &context.backend();
  for (std::int32_t i = 0; i < std::min(store->num_layers(), 3); ++i) {
    allow_errors([&] {
      const std::int32_t experts = store->layer(i).stack->num_experts();
      const auto pool = std::make_shared<ExpertPool>(
          ExpertPoolConfig{.num_experts = experts, .budget = std::min(experts, 2)});
      const OnMiss miss = way.layout == StackLayout::Auto ? OnMiss::Stage : OnMiss::Compute;
      run_layer(context, store->make_layer(i, pool, miss, options), way);
    });
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Way way({data, size});
  const fuzz::MemoryFile memory;
  memory.append(std::as_bytes(std::span(data, size)));
  memory.append(noise());
  allow_errors([&] {
    const auto file = GgufFile::open(memory.path(), {way.mmap});
    allow_errors([&] { layer_kinds(*file); });
    if (way.door == Door::Store || way.door == Door::StoreOnDisk) {
      store_and_run(file, way);
      return;
    }
    const std::vector<std::int32_t> layers = file->moe_layers();
    for (std::size_t i = 0; i < std::min<std::size_t>(layers.size(), 3); ++i) {
      allow_errors([&] { open_and_run(file, layers[i], way); });
    }
  });
  return 0;
}
