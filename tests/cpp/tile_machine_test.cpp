// The tile instructions: the machine in software that tests run them on, beside the processor where
// this one has them. What faults must be the same, and so must every bit.

#include <gtest/gtest.h>

#include <array>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../emulation/amx/tiles.hpp"
#include "cpu/isa.hpp"
#include "random.hpp"
#ifdef MOESAIC_HAVE_AMX
#include "cpu/kernels/amx/tiles.hpp"
#endif

namespace moesaic::testing {
namespace {

using cpu::TileConfig, cpu::kTileRows, cpu::kTileRowBytes;
using emulation::TileFault, emulation::TileFaultKind;

enum class Outcome { Works, GeneralProtection, UndefinedInstruction };

Outcome in_software(const std::function<void()>& run) {
  try {
    run();
  } catch (const TileFault& fault) {
    return fault.kind == TileFaultKind::GeneralProtection ? Outcome::GeneralProtection
                                                          : Outcome::UndefinedInstruction;
  }
  return Outcome::Works;
}

/// Every tile whole.
TileConfig whole() {
  TileConfig config;
  for (int t = 0; t < cpu::kTileCount; ++t) config.shape(t, kTileRows, kTileRowBytes);
  return config;
}

struct Wrong {
  const char* name;
  TileConfig config;
};
std::vector<Wrong> wrong_configs() {
  std::vector<Wrong> list;
  const auto add = [&](const char* name, const std::function<void(TileConfig&)>& change) {
    list.push_back({name, whole()});
    change(list.back().config);
  };
  add("palette 2", [](TileConfig& c) { c.palette = 2; });
  add("palette 255", [](TileConfig& c) { c.palette = 255; });
  add("a reserved byte", [](TileConfig& c) { c.reserved[0] = 1; });
  add("the last reserved byte", [](TileConfig& c) { c.reserved[13] = 1; });
  add("17 rows", [](TileConfig& c) { c.rows[3] = 17; });
  add("65 bytes in a row", [](TileConfig& c) { c.row_bytes[7] = 65; });
  add("1024 bytes in a row", [](TileConfig& c) { c.row_bytes[0] = 1024; });
  add("a ninth tile", [](TileConfig& c) { c.shape(8, 1, 4); });
  add("rows of a ninth tile", [](TileConfig& c) { c.rows[8] = 1; });
  add("bytes of a sixteenth tile", [](TileConfig& c) { c.row_bytes[15] = 4; });
  add("rows without bytes", [](TileConfig& c) { c.row_bytes[2] = 0; });
  add("bytes without rows", [](TileConfig& c) { c.rows[2] = 0; });
  return list;
}

/// The shapes of c, a and b, tiles 0, 1 and 2, of a product.
struct Shapes {
  const char* name;
  int c_rows, c_bytes, a_rows, a_bytes, b_rows, b_bytes;
};
constexpr Shapes kWrongShapes[] = {
    {"columns of c and b", 16, 64, 16, 64, 16, 32},
    {"rows of c and a", 16, 64, 15, 64, 16, 64},
    {"columns of a, rows of b", 16, 64, 16, 32, 16, 64},
    {"half words in a", 16, 64, 16, 62, 16, 64},
    {"half words in c and b", 16, 62, 16, 64, 16, 62},
};
TileConfig config_of(const Shapes& s) {
  TileConfig config;
  config.shape(0, s.c_rows, s.c_bytes);
  config.shape(1, s.a_rows, s.a_bytes);
  config.shape(2, s.b_rows, s.b_bytes);
  return config;
}

TEST(TileMachine, WrongConfigurationsFault) {
  for (const Wrong& wrong : wrong_configs()) {
    emulation::TileMachine machine;
    EXPECT_EQ(in_software([&] { machine.configure(wrong.config); }), Outcome::GeneralProtection)
        << wrong.name;
    EXPECT_FALSE(machine.configured()) << wrong.name;
  }
}

TEST(TileMachine, WrongUsesFault) {
  emulation::TileMachine machine;
  std::uint8_t memory[16 * 64] = {};
  const auto undefined = [&](const std::function<void()>& run) {
    return in_software(run) == Outcome::UndefinedInstruction;
  };
  EXPECT_TRUE(undefined([&] { machine.zero(0); })) << "not configured";
  EXPECT_TRUE(undefined([&] { machine.load(0, memory, 64); }));
  TileConfig one;
  one.shape(1, 16, 64);
  machine.configure(one);
  EXPECT_TRUE(undefined([&] { machine.store(0, memory, 64); })) << "no shape";
  machine.configure(whole());
  EXPECT_TRUE(undefined([&] { machine.dot_signed(0, 0, 1); }));
  EXPECT_TRUE(undefined([&] { machine.dot_signed(0, 1, 1); }));
  EXPECT_TRUE(undefined([&] { machine.dot_signed(1, 0, 1); }));
  for (const Shapes& shapes : kWrongShapes) {
    machine.configure(config_of(shapes));
    EXPECT_TRUE(undefined([&] { machine.dot_signed(0, 1, 2); })) << shapes.name;
  }
  machine.release();
  EXPECT_TRUE(undefined([&] { machine.zero(0); })) << "released";
}

/// What of a tile lies in 16 rows of 64 bytes.
using TileBytes = std::array<std::uint8_t, kTileRows * kTileRowBytes>;

TileBytes random_tile(Random& random) {
  TileBytes bytes;
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.bits());
  return bytes;
}

struct Operands {
  TileConfig config;
  TileBytes c, a, b;
};
/// A product of random shapes.
Operands random_operands(Random& random) {
  const int m = random.below(16) + 1, n = random.below(16) + 1, k = random.below(16) + 1;
  Operands o;
  o.config = config_of({"", m, 4 * n, m, 4 * k, k, 4 * n});
  o.c = random_tile(random);
  o.a = random_tile(random);
  o.b = random_tile(random);
  return o;
}

TileBytes software_product(const Operands& o) {
  emulation::TileMachine machine;
  machine.configure(o.config);
  machine.load(0, o.c.data(), kTileRowBytes);
  machine.load(1, o.a.data(), kTileRowBytes);
  machine.load(2, o.b.data(), kTileRowBytes);
  machine.dot_signed(0, 1, 2);
  TileBytes out;
  out.fill(0xee);
  machine.store(0, out.data(), kTileRowBytes);
  return out;
}

TEST(TileMachine, ProductsAreSumsOfProducts) {
  Random random(1);
  for (int i = 0; i < 50; ++i) {
    const Operands o = random_operands(random);
    const TileBytes got = software_product(o);
    const int rows = o.config.rows[0], words = o.config.row_bytes[0] / 4;
    const int depth = o.config.row_bytes[1];
    for (int m = 0; m < kTileRows; ++m) {
      for (int n = 0; n < kTileRowBytes / 4; ++n) {
        std::uint32_t value;
        std::memcpy(&value, got.data() + m * kTileRowBytes + 4 * n, 4);
        if (m >= rows || n >= words) {
          ASSERT_EQ(value, 0xeeeeeeeeU) << "a store wrote outside of the shape";
          continue;
        }
        std::uint32_t want;
        std::memcpy(&want, o.c.data() + m * kTileRowBytes + 4 * n, 4);
        for (int k = 0; k < depth; ++k) {
          const int left = static_cast<std::int8_t>(o.a[m * kTileRowBytes + k]);
          const int right = static_cast<std::int8_t>(o.b[k / 4 * kTileRowBytes + 4 * n + k % 4]);
          want += static_cast<std::uint32_t>(left * right);
        }
        ASSERT_EQ(value, want);
      }
    }
  }
}

#ifdef MOESAIC_HAVE_AMX

sigjmp_buf escape;
void jump_out(int signal) { siglongjmp(escape, signal); }

/// What the processor does; `run` must keep nothing that needs to be destroyed.
Outcome on_processor(void (*run)(const void*), const void* argument) {
  struct sigaction action = {};
  struct sigaction segv, ill;
  action.sa_handler = jump_out;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGILL, &action, &ill);
  const int signal = sigsetjmp(escape, 1);
  if (signal == 0) run(argument);
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGILL, &ill, nullptr);
  if (signal == SIGSEGV) return Outcome::GeneralProtection;
  return signal == SIGILL ? Outcome::UndefinedInstruction : Outcome::Works;
}

class TileProcessor : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cpu::cpu_has(CpuIsa::Amx)) GTEST_SKIP() << "this processor or system has no AMX";
  }
  void TearDown() override {
    if (cpu::cpu_has(CpuIsa::Amx)) cpu::Tiles::release();
  }
};

TEST_F(TileProcessor, FaultsWhereTheMachineDoes) {
  const auto configure = [](const void* config) {
    cpu::Tiles::configure(*static_cast<const TileConfig*>(config));
  };
  const TileConfig right = whole();
  EXPECT_EQ(on_processor(configure, &right), Outcome::Works);
  for (const Wrong& wrong : wrong_configs()) {
    EXPECT_EQ(on_processor(configure, &wrong.config), Outcome::GeneralProtection) << wrong.name;
  }
  const auto multiply = [](const void* config) {
    cpu::Tiles::configure(*static_cast<const TileConfig*>(config));
    cpu::Tiles::dot_signed<0, 1, 2>();
  };
  for (const Shapes& shapes : kWrongShapes) {
    const TileConfig config = config_of(shapes);
    EXPECT_EQ(on_processor(multiply, &config), Outcome::UndefinedInstruction) << shapes.name;
  }
  const auto zero = [](const void*) {
    cpu::Tiles::release();
    cpu::Tiles::zero<0>();
  };
  EXPECT_EQ(on_processor(zero, nullptr), Outcome::UndefinedInstruction);
}

TEST_F(TileProcessor, MultipliesAsTheMachineDoes) {
  Random random(2);
  for (int i = 0; i < 300; ++i) {
    const Operands o = random_operands(random);
    TileBytes out;
    out.fill(0xee);
    cpu::Tiles::configure(o.config);
    cpu::Tiles::load<0>(o.c.data(), kTileRowBytes);
    cpu::Tiles::load<1>(o.a.data(), kTileRowBytes);
    cpu::Tiles::load<2>(o.b.data(), kTileRowBytes);
    cpu::Tiles::dot_signed<0, 1, 2>();
    cpu::Tiles::store<0>(out.data(), kTileRowBytes);
    ASSERT_EQ(out, software_product(o)) << i;
  }
}

#endif

}  // namespace
}  // namespace moesaic::testing
