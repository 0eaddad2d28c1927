// The fake runtime refuses what Metal refuses: without this its silence would prove nothing.

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>

#include "fake_runtime/fake_metal.hpp"
#include "metal/arguments.h"
#include "metal/host/errors.hpp"
#include "metal/host/metal_cpp.hpp"

namespace moesaic::metal {
namespace {

using metal_args::WordsArgs;

/// A pipeline of fill_words and an open encoder.
class FakeRuntime : public ::testing::Test {
 protected:
  FakeRuntime() {
    const auto library = compile("kernel void", false);
    const auto constants = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
    NS::Error* error = nullptr;
    const auto function =
        NS::TransferPtr(library->newFunction(string("fill_words"), constants.get(), &error));
    pipeline_ = NS::TransferPtr(device_->newComputePipelineState(function.get(), &error));
    queue_ = NS::TransferPtr(device_->newCommandQueue());
    buffer_ = NS::TransferPtr(device_->newBuffer(4096, MTL::ResourceStorageModeShared));
    next();
  }
  static NS::String* string(const char* text) {
    return NS::String::string(text, NS::UTF8StringEncoding);
  }
  NS::SharedPtr<MTL::Library> compile(const char* source, bool fast_math) {
    const auto options = NS::TransferPtr(MTL::CompileOptions::alloc()->init());
    options->setFastMathEnabled(fast_math);
    NS::Error* error = nullptr;
    return NS::TransferPtr(device_->newLibrary(string(source), options.get(), &error));
  }
  void set_all() {
    const WordsArgs args{1024, 7, 0};
    encoder_->setComputePipelineState(pipeline_.get());
    encoder_->setBytes(&args, sizeof args, 0);
    encoder_->setBuffer(buffer_.get(), 0, 1);
  }
  void dispatch(unsigned groups = 4, unsigned threads = 256) {
    encoder_->dispatchThreadgroups(MTL::Size::Make(groups, 1, 1), MTL::Size::Make(threads, 1, 1));
  }
  /// A new recording where one was committed.
  void next() {
    commands_ = queue_->commandBuffer();
    encoder_ = commands_->computeCommandEncoder();
  }
  void TearDown() override {
    encoder_->endEncoding();
    fake_metal::pace() = {};
  }

  AutoreleaseScope scope_;
  NS::SharedPtr<MTL::Device> device_ = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
  NS::SharedPtr<MTL::ComputePipelineState> pipeline_;
  NS::SharedPtr<MTL::CommandQueue> queue_;
  NS::SharedPtr<MTL::Buffer> buffer_;
  MTL::CommandBuffer* commands_;
  MTL::ComputeCommandEncoder* encoder_;
};

TEST_F(FakeRuntime, RunsWhenWaitedFor) {
  fake_metal::pace().idle = std::chrono::hours(1);
  set_all();
  dispatch();
  encoder_->endEncoding();
  const auto* words = static_cast<const unsigned*>(buffer_->contents());
  commands_->commit();
  EXPECT_EQ(words[0], ~0U) << "poison until somebody waits";
  EXPECT_NE(commands_->status(), MTL::CommandBufferStatusCompleted);
  commands_->waitUntilCompleted();
  EXPECT_EQ(commands_->status(), MTL::CommandBufferStatusCompleted);
  EXPECT_EQ(words[0], 7U);
  EXPECT_EQ(words[1023], 7U);
  next();
}

TEST_F(FakeRuntime, RunsOnItsOwn) {
  fake_metal::pace().takes = std::chrono::milliseconds(5);
  set_all();
  dispatch();
  encoder_->endEncoding();
  commands_->commit();
  while (commands_->status() != MTL::CommandBufferStatusCompleted) std::this_thread::yield();
  EXPECT_EQ(static_cast<const unsigned*>(buffer_->contents())[1023], 7U);
  next();
}

TEST_F(FakeRuntime, FailsAsTheCommitWasTold) {
  set_all();
  dispatch();
  encoder_->endEncoding();
  fake_metal::faults().command_error = 14;
  commands_->commit();
  fake_metal::faults() = {};
  commands_->waitUntilCompleted();
  EXPECT_EQ(commands_->status(), MTL::CommandBufferStatusError);
  EXPECT_EQ(commands_->error()->code(), 14);
  EXPECT_EQ(*static_cast<const unsigned*>(buffer_->contents()), ~0U) << "nothing ran";
  next();
}

using FakeRuntimeDeath = FakeRuntime;

TEST_F(FakeRuntimeDeath, HasSixtyFourCommandBuffers) {
  fake_metal::pace().patience = std::chrono::milliseconds(10);
  for (int i = 1; i < 64; ++i) queue_->commandBuffer();
  EXPECT_DEATH(queue_->commandBuffer(), "64 command buffers are open");
}

TEST_F(FakeRuntimeDeath, WantsAutoreleasePools) {
  EXPECT_DEATH(std::thread([&] { commands_->commit(); }).join(), "needs an autorelease pool");
  EXPECT_DEATH(std::thread([&] { queue_->commandBuffer(); }).join(), "needs an autorelease pool");
  EXPECT_DEATH(std::thread([&] { device_->newBuffer(64, MTL::ResourceStorageModeShared); }).join(),
               "needs an autorelease pool");
}

TEST_F(FakeRuntimeDeath, NamesUnknownSelectors) {
  EXPECT_DEATH(device_->registryID(), "MTLDevice registryID. is not known");
  EXPECT_DEATH(encoder_->insertDebugSignpost(string("x")), "insertDebugSignpost:");
}

TEST_F(FakeRuntimeDeath, RefusesUnfinishedEncoders) {
  set_all();
  dispatch();
  EXPECT_DEATH(commands_->commit(), "a commit with an open encoder");
  EXPECT_DEATH(commands_->computeCommandEncoder(), "one encoder at a time");
  EXPECT_DEATH(
      {
        encoder_->endEncoding();
        dispatch();
      },
      "a dispatch after endEncoding");
}

TEST_F(FakeRuntimeDeath, RefusesBadBindings) {
  EXPECT_DEATH(dispatch(), "without a pipeline");
  const std::string bytes(4097, 'x');
  EXPECT_DEATH(encoder_->setBytes(bytes.data(), bytes.size(), 0), "more than 4096 inline bytes");
  EXPECT_DEATH(encoder_->setBuffer(nullptr, 0, 1), "outside its buffer");
  EXPECT_DEATH(encoder_->setBuffer(buffer_.get(), 4096, 1), "outside its buffer");
  EXPECT_DEATH(encoder_->setBuffer(buffer_.get(), 0, 31), "buffer indices");
  const WordsArgs args{1024, 7, 0};
  encoder_->setComputePipelineState(pipeline_.get());
  encoder_->setBytes(&args, sizeof args, 0);
  EXPECT_DEATH(dispatch(), "buffer 1 is not set");
  encoder_->setBuffer(buffer_.get(), 2, 1);
  EXPECT_DEATH(dispatch(), "not aligned to the buffer's type");
  encoder_->setBuffer(buffer_.get(), 0, 1);
  encoder_->setBytes(&args, 8, 0);
  EXPECT_DEATH(dispatch(), "arguments of another size");
}

TEST_F(FakeRuntimeDeath, RefusesBadGrids) {
  set_all();
  EXPECT_DEATH(dispatch(1, 1056), "more than 1024 threads");
  EXPECT_DEATH(dispatch(1, 40), "whole simdgroups");
  EXPECT_DEATH(dispatch(0), "a grid without threadgroups");
  EXPECT_DEATH(encoder_->dispatchThreadgroups(buffer_.get(), 4090, MTL::Size::Make(32, 1, 1)),
               "an indirect grid outside its buffer");
  EXPECT_DEATH(
      {
        encoder_->dispatchThreadgroups(buffer_.get(), 0, MTL::Size::Make(32, 1, 1));
        encoder_->endEncoding();
        commands_->commit();
        commands_->waitUntilCompleted();
      },
      "an indirect grid of garbage");
}

TEST_F(FakeRuntimeDeath, RefusesBadMemory) {
  alignas(64) static char memory[64];
  EXPECT_DEATH(device_->newBuffer(memory, 64, MTL::ResourceStorageModeShared, nullptr),
               "needs whole pages");
  EXPECT_DEATH(device_->newBuffer(0, MTL::ResourceStorageModeShared), "a buffer of no bytes");
  EXPECT_DEATH(static_cast<char*>(buffer_->contents())[4096] = 1, "");
}

TEST_F(FakeRuntimeDeath, RefusesFastMathAndFiles) {
  EXPECT_DEATH(compile("kernel void", true), "fast math");
  EXPECT_DEATH(compile("#include \"x.h\"\nkernel void", false), "finds no files");
}

}  // namespace
}  // namespace moesaic::metal
