#include <utility>

#include "backend/builtin.hpp"

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
  Support supports(const WeightRef&) const override { return {.ok = false, .reason = reason_}; }

 private:
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
