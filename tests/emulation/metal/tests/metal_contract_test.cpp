// The contract suite with the Metal backend registered beside the others: host code under the fake
// runtime, kernels in the emulator.

#include "backend/builtin.hpp"
#include "contract_test.cpp"

namespace moesaic::testing {
namespace {

class MetalEnvironment : public ::testing::Environment {
 public:
  void SetUp() override {
    backend_ = metal::create_backend();
    ASSERT_TRUE(backend_->info().available) << backend_->info().reason;
    registration_ = register_backend(backend_);
  }
  void TearDown() override {
    registration_.reset();
    backend_.reset();
  }

 private:
  std::shared_ptr<const Backend> backend_;
  std::shared_ptr<void> registration_;
};
const auto* const environment = ::testing::AddGlobalTestEnvironment(new MetalEnvironment);

}  // namespace
}  // namespace moesaic::testing
