// The backend contract (tests/cpp/contract_test.cpp) with an emulated CUDA backend registered
// beside the others.

#include "contract_test.cpp"  // NOLINT(bugprone-suspicious-include)
#include "emulated_gpu.hpp"

namespace moesaic::testing {
namespace {

class WithEmulatedGpu : public ::testing::Environment {
 public:
  void SetUp() override { registration_ = register_backend(EmulatedGpu::get().make_backend()); }
  void TearDown() override {
    EmulatedGpu& gpu = EmulatedGpu::get();
    EXPECT_TRUE(gpu.guards_untouched());
    EXPECT_EQ(gpu.refused, "");
    registration_.reset();
  }

 private:
  std::shared_ptr<void> registration_;
};
const auto* const environment = ::testing::AddGlobalTestEnvironment(new WithEmulatedGpu);

}  // namespace
}  // namespace moesaic::testing
