#include "moesaic/workspace.hpp"

#include <cstdint>
#include <string>
#include <thread>

#include "count_allocations.hpp"
#include "gtest/gtest.h"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

using ::moesaic::test::count_allocations;

std::size_t carve(Carver carver, float** a = nullptr, std::int32_t** b = nullptr) {
  auto* first = carver.take<float>(3, "a");
  auto* second = carver.take<std::int32_t>(100, "b");
  if (a != nullptr) *a = first;
  if (b != nullptr) *b = second;
  return carver.used();
}

TEST(Carver, CountsWhatItCarves) {
  float* a = nullptr;
  std::int32_t* b = nullptr;
  const std::size_t bytes = carve(Carver::counting(), &a, &b);
  EXPECT_EQ(bytes, 64U + 400U);
  EXPECT_EQ(a, nullptr);
  EXPECT_EQ(b, nullptr);

  Workspace workspace(bytes);
  EXPECT_EQ(carve({workspace.data(), workspace.size()}, &a, &b), bytes);
  EXPECT_EQ(reinterpret_cast<std::byte*>(a), workspace.data());
  EXPECT_EQ(reinterpret_cast<std::byte*>(b), workspace.data() + 64);
}

TEST(Carver, OneByteLessNamesTheSlot) {
  const std::size_t bytes = carve(Carver::counting());
  Workspace workspace(bytes - 1);
  try {
    carve({workspace.data(), workspace.size()});
    FAIL() << "carved too much";
  } catch (const WorkspaceError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("b: expected at least 464 bytes, got 463"), std::string::npos) << text;
  }
}

TEST(Carver, RejectsSizesOutOfRange) {
  Carver carver = Carver::counting();
  EXPECT_THROW(carver.take<std::byte>(-1, "a"), WorkspaceError);
  carver.take<std::byte>(100, "a");
  EXPECT_THROW(carver.take<std::byte>(-150, "b"), WorkspaceError);
  EXPECT_EQ(carver.used(), 100U);
}

TEST(Workspace, IsAligned) {
  for (const std::size_t bytes : {1, 63, 64, 1000}) {
    const Workspace workspace(bytes);
    EXPECT_EQ(workspace.size(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(workspace.data()) % kWorkspaceAlignment, 0U);
  }
}

TEST(Workspace, EmptyOneStillFailsInsteadOfCounting) {
  Workspace workspace(0);
  ASSERT_NE(workspace.data(), nullptr);
  EXPECT_THROW(carve({workspace.data(), workspace.size()}), WorkspaceError);
  workspace.reserve(1000);
  EXPECT_NO_THROW(carve({workspace.data(), workspace.size()}));
}

TEST(Workspace, ReserveGrowsOnly) {
  Workspace workspace(128);
  EXPECT_EQ(count_allocations([&] { workspace.reserve(64); }), 0);
  EXPECT_EQ(workspace.size(), 128U);
  EXPECT_GT(count_allocations([&] { workspace.reserve(256); }), 0);
  EXPECT_EQ(workspace.size(), 256U);
}

TEST(Workspace, ImpossibleSizeIsOutOfMemory) {
  EXPECT_THROW(Workspace(SIZE_MAX / 2), OutOfMemoryError);
  Workspace workspace(128);
  EXPECT_THROW(workspace.reserve(SIZE_MAX / 2), OutOfMemoryError);
  EXPECT_EQ(workspace.size(), 0U);
  EXPECT_NO_THROW(workspace.reserve(128));
  EXPECT_EQ(workspace.size(), 128U);
}

TEST(Workspace, Borrowed) {
  alignas(64) std::byte memory[256];
  Workspace workspace(memory, sizeof memory);
  EXPECT_EQ(workspace.data(), memory);
  EXPECT_NO_THROW(workspace.reserve(256));
  EXPECT_THROW(workspace.reserve(257), WorkspaceError);
  EXPECT_THROW(Workspace(memory + 1, 64), WorkspaceError);
  EXPECT_THROW(Workspace(nullptr, 64), WorkspaceError);
}

TEST(Workspace, OneUseAtATime) {
  Workspace workspace(64);
  {
    const Workspace::Use use(workspace);
    EXPECT_THROW(Workspace::Use second(workspace), WorkspaceError);
    EXPECT_THROW(workspace.reserve(1), WorkspaceError);
    bool refused = false;
    std::thread([&] {
      try {
        const Workspace::Use other(workspace);
      } catch (const WorkspaceError&) {
        refused = true;
      }
    }).join();
    EXPECT_TRUE(refused);
  }
  EXPECT_NO_THROW(Workspace::Use again(workspace));
  EXPECT_NO_THROW(workspace.reserve(128));
}

}  // namespace
}  // namespace moesaic
