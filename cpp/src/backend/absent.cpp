#include <utility>

#include "backend/builtin.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

class AbsentBackend final : public Backend {
 public:
  AbsentBackend(DeviceType type, std::string name, std::string reason)
      : type_(type), name_(std::move(name)), reason_(std::move(reason)) {}

  BackendInfo info() const override {
    return {.name = name_, .available = false, .reason = reason_, .devices = {}, .detail = ""};
  }
  DeviceType device_type() const override { return type_; }
  std::string kernel_name(const WeightRef&, const Tuning&) const override { fail(); }
  Support supports(const WeightRef&) const override { return {.ok = false, .reason = reason_}; }

  void* allocate(std::size_t) const override { fail(); }
  void deallocate(void*, std::size_t) const noexcept override {}
  void copy(void*, const void*, std::size_t) const override { fail(); }
  void synchronize(Context&) const override { fail(); }
  void prepare(ExpertStack::Parts&, const LoadOptions&) const override { fail(); }
  std::size_t scratch_bytes(const ScratchQuery&) const override { fail(); }

  void router_logits(Context&, const InputRows&, const float*, std::int32_t,
                     float*) const override {
    fail();
  }
  RouteStats route(Context&, const float*, std::int64_t, const RouterConfig&, RoutingView,
                   float*) const override {
    fail();
  }
  void bucket_plan(Context&, const RoutingView&, std::int32_t, BucketPlanView) const override {
    fail();
  }
  void align(Context&, const BucketPlanView&, std::int64_t, std::int32_t, std::int32_t, RowSpace,
             AlignedRoutingView) const override {
    fail();
  }
  void gather(Context&, const InputRows&, const std::int32_t*, std::int64_t,
              float*) const override {
    fail();
  }
  void expert_gemm(Context&, const GemmCall&) const override { fail(); }
  void activate(Context&, const Activation&, const float*, const float*, std::int64_t, std::int64_t,
                std::int64_t, float*) const override {
    fail();
  }
  void combine(Context&, const CombineCall&) const override { fail(); }

 private:
  [[noreturn]] void fail() const { throw DeviceError(Problem{name_, "backend", "", reason_, ""}); }

  DeviceType type_;
  std::string name_;
  std::string reason_;
};

}  // namespace

std::shared_ptr<const Backend> absent_backend(DeviceType type, std::string name,
                                              std::string reason) {
  return std::make_shared<AbsentBackend>(type, std::move(name), std::move(reason));
}

std::shared_ptr<const Backend> metal_backend() {
#ifdef MOESAIC_METAL_ABSENT
  return absent_backend(DeviceType::Metal, "metal", MOESAIC_METAL_ABSENT);
#else
  return metal::create_backend();
#endif
}

}  // namespace moesaic
