// Which tensors of a GGUF file are the experts of a block, by their names.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "gguf_fixture.hpp"

namespace moesaic::test {
namespace {

TEST_F(GgufTest, MoeTensorsOfEveryName) {
  GgufWriter writer;
  const auto add = [&](const char* name) { writer.filled(name, QuantType::F32, {2}); };
  for (const char* name : {"blk.3.ffn_gate_inp.weight",
                           "blk.3.ffn_gate_inp.bias",
                           "blk.3.exp_probs_b.bias",
                           "blk.3.ffn_gate_exps.weight",
                           "blk.3.ffn_up_exps.weight",
                           "blk.3.ffn_down_exps.weight",
                           "blk.3.ffn_gate_exps.bias",
                           "blk.3.ffn_up_exps.bias",
                           "blk.3.ffn_down_exps.bias",
                           "blk.3.ffn_gate_exps.scale",
                           "blk.3.ffn_up_exps.scale",
                           "blk.3.ffn_down_exps.scale",
                           "blk.3.ffn_gate_shexp.weight",
                           "blk.3.ffn_up_shexp.weight",
                           "blk.3.ffn_down_shexp.weight",
                           "blk.3.ffn_gate_inp_shexp.weight",
                           "blk.10.ffn_gate_up_exps.weight",
                           "blk.10.ffn_down_exps.weight",
                           "blk.10.exp_probs_b",
                           "blk.2.ffn_up.weight",
                           "blk.2.ffn_gate_inp.weight",
                           "blk.03.ffn_up_exps.weight",
                           "blk.-1.ffn_up_exps.weight",
                           "blk.-0.ffn_up_exps.weight",
                           "blk..ffn_up_exps.weight",
                           "blk.99999999999.ffn_up_exps.weight",
                           "blk.7",
                           "blk.8.ffn_up_exps.weight.x"}) {
    add(name);
  }
  const auto file = open(writer.bytes());
  EXPECT_EQ(file->moe_layers(), (std::vector<std::int32_t>{3, 10}));

  const MoeTensors all = find_moe_tensors(*file, 3);
  const auto is = [&](const GgufTensor* tensor, const std::string& rest) {
    ASSERT_NE(tensor, nullptr) << rest;
    EXPECT_EQ(tensor->name, "blk.3." + rest);
  };
  is(all.router, "ffn_gate_inp.weight");
  is(all.router_bias, "ffn_gate_inp.bias");
  is(all.selection_bias, "exp_probs_b.bias");
  is(all.gate, "ffn_gate_exps.weight");
  is(all.up, "ffn_up_exps.weight");
  is(all.down, "ffn_down_exps.weight");
  is(all.gate_bias, "ffn_gate_exps.bias");
  is(all.up_bias, "ffn_up_exps.bias");
  is(all.down_bias, "ffn_down_exps.bias");
  is(all.gate_scale, "ffn_gate_exps.scale");
  is(all.up_scale, "ffn_up_exps.scale");
  is(all.down_scale, "ffn_down_exps.scale");
  is(all.shared_gate, "ffn_gate_shexp.weight");
  is(all.shared_up, "ffn_up_shexp.weight");
  is(all.shared_down, "ffn_down_shexp.weight");
  is(all.shared_router, "ffn_gate_inp_shexp.weight");
  EXPECT_EQ(all.gate_up, nullptr);
  EXPECT_TRUE(all.has_experts());

  const MoeTensors fused = find_moe_tensors(*file, 10);
  ASSERT_NE(fused.gate_up, nullptr);
  EXPECT_EQ(fused.gate_up->name, "blk.10.ffn_gate_up_exps.weight");
  ASSERT_NE(fused.selection_bias, nullptr);
  EXPECT_EQ(fused.selection_bias->name, "blk.10.exp_probs_b");
  EXPECT_EQ(fused.router, nullptr);
  EXPECT_TRUE(fused.has_experts());
  EXPECT_FALSE(find_moe_tensors(*file, 2).has_experts());
  EXPECT_FALSE(find_moe_tensors(*file, -1).has_experts());
}

TEST_F(GgufTest, OneTensorPerExpert) {
  GgufWriter writer;
  for (const int expert : {0, 2, 1, 10, 9, 8, 7, 6, 5, 4, 3}) {
    for (const char* role : {"gate", "up", "down"}) {
      writer.filled("blk.1.ffn_" + std::string(role) + "." + std::to_string(expert) + ".weight",
                    QuantType::F32, {2, 2});
    }
  }
  const auto file = open(writer.bytes());
  EXPECT_EQ(file->moe_layers(), std::vector<std::int32_t>{1});
  const MoeTensors tensors = find_moe_tensors(*file, 1);
  EXPECT_TRUE(tensors.has_experts());
  EXPECT_EQ(tensors.expert_gate.size(), 11u);
  EXPECT_EQ(tensors.expert_up.size(), 11u);
  ASSERT_EQ(tensors.expert_down.size(), 11u);
  EXPECT_EQ(tensors.expert_down[10]->name, "blk.1.ffn_down.10.weight");
  EXPECT_EQ(tensors.expert_gate[2]->name, "blk.1.ffn_gate.2.weight");

  writer.filled("blk.1.ffn_up.12.weight", QuantType::F32, {2, 2});
  EXPECT_THROW(find_moe_tensors(*open(writer.bytes()), 1), FormatError);
}

}  // namespace
}  // namespace moesaic::test
