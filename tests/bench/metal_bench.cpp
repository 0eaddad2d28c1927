// One MoE layer on Metal, measured from C++: a JSON object per format and number of tokens, one a line.
//
//   metal_bench [--hidden N] [--intermediate N] [--experts N] [--top-k N] [--tokens 1,8,64,512]
//               [--formats Q4_K,MXFP4] [--calls N]
//
// wall_us is the median time of a call with its wait, gpu_us that in which the GPU ran it, first_use_s
// the first call, which compiles kernels; bytes are those of the experts that were used. rel_l2 is the
// distance to the reference on the CPU, over at most 4 tokens.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "device_array.hpp"
#include "metal/host/queue.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/quant.hpp"
#include "moesaic/routing.hpp"
#include "moesaic/workspace.hpp"
#include "random.hpp"

namespace moesaic::testing {
namespace {

using Clock = std::chrono::steady_clock;
using Floats = std::vector<float>;

struct Options {
  std::int64_t hidden = 2048, intermediate = 768;
  std::int32_t experts = 128, top_k = 8;
  std::vector<std::int64_t> tokens{1, 8, 64, 512};
  std::vector<QuantType> formats{QuantType::Q4_K, QuantType::Q6_K, QuantType::Q8_0,
                                 QuantType::MXFP4, QuantType::F16};
  int calls = 30;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = words[i], value = words[i + 1];
    if (name == "--hidden") {
      options.hidden = std::stoll(value);
    } else if (name == "--intermediate") {
      options.intermediate = std::stoll(value);
    } else if (name == "--experts") {
      options.experts = std::stoi(value);
    } else if (name == "--top-k") {
      options.top_k = std::stoi(value);
    } else if (name == "--calls") {
      options.calls = std::stoi(value);
    } else if (name == "--tokens") {
      options.tokens.clear();
      for (const std::string& part : split(value)) options.tokens.push_back(std::stoll(part));
    } else if (name == "--formats") {
      options.formats.clear();
      for (const std::string& part : split(value)) {
        const auto type = quant_type_from_name(part);
        if (!type) throw ConfigError("metal_bench: no such format: " + part);
        options.formats.push_back(*type);
      }
    } else {
      throw ConfigError("metal_bench: no such option: " + name);
    }
  }
  return options;
}

/// A role whose experts have the same weights at addresses of their own: encoding one is enough.
ExpertStack::EncodedRole make_role(QuantType type, std::int32_t experts, std::int64_t rows,
                                   std::int64_t cols, std::uint32_t seed) {
  const auto row = static_cast<std::size_t>(row_bytes(type, cols));
  const std::size_t expert = row * static_cast<std::size_t>(rows);
  const auto bytes =
      std::make_shared<std::vector<std::byte>>(expert * static_cast<std::size_t>(experts));
  Random random(seed);
  Floats values(static_cast<std::size_t>(cols));
  for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
    // Rows repeat after some, since encoders take their time.
    if (r >= 64) {
      std::memcpy(bytes->data() + r * row, bytes->data() + (r - 64) * row, row);
      continue;
    }
    for (float& v : values) v = random.normal(1.0F / std::sqrt(static_cast<float>(cols)));
    quantize_row(type, values.data(), bytes->data() + r * row, cols);
  }
  for (std::size_t e = 1; e < static_cast<std::size_t>(experts); ++e) {
    std::memcpy(bytes->data() + e * expert, bytes->data(), expert);
  }
  return {type, experts, rows, cols, bytes->data(), bytes->size(), bytes};
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// One format at one number of tokens.
void measure(const Options& options, const Backend& backend, const ExpertStack& stack,
             const ExpertStack& on_host, QuantType type, std::int64_t tokens) {
  Context context(backend, Tuning::process(), ThreadPool::shared(1));
  LayerRef layer;
  layer.stack = &stack;
  const auto bytes = workspace_bytes(context, layer, options.top_k, tokens);
  Workspace workspace(bytes, backend);
  Random random(3);
  Floats x(static_cast<std::size_t>(tokens * options.hidden));
  for (float& v : x) v = random.normal(1.0F);
  Routing routing(tokens, options.top_k);
  std::set<std::int32_t> used;
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::set<std::int32_t> of_token;
    while (of_token.size() < static_cast<std::size_t>(options.top_k)) {
      of_token.insert(
          static_cast<std::int32_t>(random.uniform() * static_cast<float>(options.experts)) %
          options.experts);
    }
    std::int64_t pair = t * options.top_k;
    for (const std::int32_t id : of_token) {
      routing.topk_ids()[static_cast<std::size_t>(pair)] = id;
      routing.topk_weights()[static_cast<std::size_t>(pair++)] =
          1.0F / static_cast<float>(options.top_k);
      used.insert(id);
    }
  }
  const std::vector<std::int32_t> ids(routing.topk_ids().begin(), routing.topk_ids().end());
  const Floats weights(routing.topk_weights().begin(), routing.topk_weights().end());
  const DeviceArray<float> in(backend, x), factors(backend, weights);
  const DeviceArray<std::int32_t> chosen(backend, ids);
  const DeviceArray<float> y(backend, tokens * options.hidden);
  ForwardIo io;
  io.x = ConstTensorView(in.data(), DType::F32, {tokens, options.hidden}, backend.device());
  io.routing = {chosen.data(), factors.data(), tokens, options.top_k};
  io.out = TensorView(y.data(), DType::F32, {tokens, options.hidden}, backend.device());

  double on_gpu = 0;
  const auto call = [&] {
    const double before = metal::gpu_seconds(context);
    const Clock::time_point begin = Clock::now();
    moe_forward(context, layer, io, workspace);
    backend.synchronize(context);
    const double wall = seconds_since(begin);
    on_gpu = metal::gpu_seconds(context) - before;
    return wall;
  };
  const double first = call();
  std::vector<double> wall, gpu;
  for (int i = 0; i < options.calls; ++i) {
    wall.push_back(call());
    gpu.push_back(on_gpu);
  }

  const std::int64_t checked = std::min<std::int64_t>(tokens, 4);
  Floats want(static_cast<std::size_t>(checked * options.hidden));
  LayerRef host = layer;
  host.stack = &on_host;
  ForwardIo reference;
  reference.x = ConstTensorView(x.data(), DType::F32, {checked, options.hidden});
  reference.routing = {routing.topk_ids().data(), routing.topk_weights().data(), checked,
                       options.top_k};
  reference.out = TensorView(want.data(), DType::F32, {checked, options.hidden});
  moe_forward_cpu(host, reference);
  const Floats got = y.host();
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2.0);
    norm += std::pow(static_cast<double>(want[i]), 2.0);
  }
  std::map<std::string, std::string> facts;
  for (const auto& [name, value] : explain(context, layer, options.top_k, tokens).facts) {
    facts[name] = value;
  }
  const double read = static_cast<double>(stack.nbytes()) * static_cast<double>(used.size()) /
                      static_cast<double>(options.experts);
  std::printf(
      "{\"device\": \"%s\", \"format\": \"%s\", \"hidden\": %lld, \"intermediate\": %lld, "
      "\"experts\": %d, \"top_k\": %d, \"tokens\": %lld, \"path\": \"%s\", \"wall_us\": %.1f, "
      "\"gpu_us\": %.1f, \"bytes\": %.0f, \"gpu_gb_per_s\": %.1f, \"rel_l2\": %.2e, "
      "\"first_use_s\": %.3f}\n",
      backend.info().detail.c_str(), std::string(traits(type).name).c_str(),
      static_cast<long long>(options.hidden), static_cast<long long>(options.intermediate),
      options.experts, options.top_k, static_cast<long long>(tokens), facts["path"].c_str(),
      median(wall) * 1e6, median(gpu) * 1e6, read, read / std::max(median(gpu), 1e-9) * 1e-9,
      std::sqrt(error / norm), first);
  std::fflush(stdout);
}

void run(const Options& options) {
  const Backend& backend = backend_for({DeviceType::Metal, 0});
  for (const QuantType type : options.formats) {
    const auto [experts, hidden, intermediate] =
        std::tuple(options.experts, options.hidden, options.intermediate);
    const auto gate = make_role(type, experts, intermediate, hidden, 1);
    const auto up = make_role(type, experts, intermediate, hidden, 2);
    const auto down = make_role(type, experts, hidden, intermediate, 4);
    LoadOptions there;
    there.backend = &backend;
    const ExpertStack stack = ExpertStack::from_encoded(gate, up, down, there);
    const ExpertStack on_host = ExpertStack::from_encoded(gate, up, down);
    for (const std::int64_t tokens : options.tokens) {
      measure(options, backend, stack, on_host, type, tokens);
    }
  }
}

}  // namespace
}  // namespace moesaic::testing

int main(int count, char** words) {
  try {
    moesaic::testing::run(moesaic::testing::parse(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "metal_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
