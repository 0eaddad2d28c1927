#include "base/pages.hpp"
#include "offload/source.hpp"

namespace moesaic::offload {
namespace {

class MappedBatch final : public ExpertBatch {
 public:
  MappedBatch(const ExpertStack& stack, std::span<const std::int32_t> experts)
      : stack_(stack), experts_(experts.begin(), experts.end()) {}
  ExpertBytes wait(std::size_t i) override {
    ExpertBytes bytes{};
    for (const Role role : kRoles) {
      const WeightRef& ref = stack_.role(role).ref;
      if (ref) bytes[static_cast<std::size_t>(role)] = ref.expert(experts_[i]);
    }
    return bytes;
  }
  bool ready(std::size_t) override { return true; }

 private:
  const ExpertStack& stack_;
  std::vector<std::int32_t> experts_;
};

class MappedSource final : public ExpertSource {
 public:
  explicit MappedSource(const std::vector<LayerMoeWeights>& layers) {
    for (const LayerMoeWeights& layer : layers) stacks_.push_back(layer.stack);
  }
  std::int32_t batch_limit() const override { return INT32_MAX; }
  std::unique_ptr<ExpertBatch> open(std::int32_t layer,
                                    std::span<const std::int32_t> experts) override {
    return std::make_unique<MappedBatch>(*stacks_[static_cast<std::size_t>(layer)], experts);
  }
  void expect(std::int32_t layer, std::span<const std::int32_t> experts, Expect) override {
    const ExpertStack& stack = *stacks_[static_cast<std::size_t>(layer)];
    for (const Role role : kRoles) {
      const WeightRef& ref = stack.role(role).ref;
      if (!ref) continue;
      for (const std::int32_t e : experts) {
        will_read({ref.expert(e), static_cast<std::size_t>(ref.expert_bytes())});
      }
    }
  }

 private:
  std::vector<std::shared_ptr<const ExpertStack>> stacks_;
};

}  // namespace

std::unique_ptr<ExpertSource> make_mapped_source(const std::vector<LayerMoeWeights>& layers) {
  return std::make_unique<MappedSource>(layers);
}

}  // namespace moesaic::offload
