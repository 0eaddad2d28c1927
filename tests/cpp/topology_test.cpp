#include "base/topology.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "moesaic/thread_pool.hpp"

namespace moesaic {
namespace {

using Ids = std::vector<std::int32_t>;

TEST(CpuList, RangesAndSingleNumbers) {
  EXPECT_EQ(parse_cpu_list("0-3,8,10-11\n"), (Ids{0, 1, 2, 3, 8, 10, 11}));
  EXPECT_EQ(parse_cpu_list("5"), Ids{5});
  EXPECT_EQ(parse_cpu_list(""), Ids{});
  EXPECT_EQ(parse_cpu_list("\n"), Ids{});
  EXPECT_EQ(parse_cpu_list("1,x"), Ids{1});
  EXPECT_EQ(parse_cpu_list("2-"), Ids{});
}

/// A tree like /sys/devices/system, and a process that may use all of it.
class SysfsTree : public testing::Test {
 protected:
  void SetUp() override {
    view_.sysfs = std::filesystem::path(testing::TempDir()) /
                  ("moesaic_sysfs_" + std::to_string(getpid()) + "_" +
                   testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(view_.sysfs);
  }
  void TearDown() override { std::filesystem::remove_all(view_.sysfs); }
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((view_.sysfs / path).parent_path());
    std::ofstream(view_.sysfs / path) << text << "\n";
  }
  void cpus(std::int32_t count) {
    for (std::int32_t cpu = 0; cpu < count; ++cpu) view_.cpus.push_back(cpu);
  }
  void core(const std::string& list) {
    for (const std::int32_t cpu : parse_cpu_list(list)) {
      write("cpu/cpu" + std::to_string(cpu) + "/topology/core_cpus_list", list);
    }
  }
  void node(int id, const std::string& cpulist, const std::string& distance) {
    write("node/node" + std::to_string(id) + "/cpulist", cpulist);
    write("node/node" + std::to_string(id) + "/distance", distance);
  }
  void two_nodes() {
    cpus(8);
    write("node/online", "0-1");
    write("node/has_memory", "0-1");
    node(0, "0-3", "10 21");
    node(1, "4-7", "21 10");
  }
  Topology read(std::int32_t nodes = 0) const { return read_topology(view_, nodes); }

  SystemView view_;
};

TEST_F(SysfsTree, NoNodes) {
  cpus(4);
  const Topology topology = read();
  ASSERT_EQ(topology.nodes.size(), 1U);
  EXPECT_EQ(topology.nodes[0].cpus, (Ids{0, 1, 2, 3}));
  EXPECT_EQ(topology.nodes[0].id, -1);
  EXPECT_EQ(topology.text(), "1 node (4 cores)");
  EXPECT_FALSE(topology.binds());
}

TEST_F(SysfsTree, TwoNodes) {
  two_nodes();
  const Topology topology = read();
  ASSERT_EQ(topology.nodes.size(), 2U);
  EXPECT_EQ(topology.nodes[1].id, 1);
  EXPECT_EQ(topology.nodes[1].cpus, (Ids{4, 5, 6, 7}));
  EXPECT_TRUE(topology.binds());
  EXPECT_EQ(topology.text(), "2 nodes: 0 (4 cores), 1 (4 cores)");
}

TEST_F(SysfsTree, Off) {
  two_nodes();
  const Topology topology = read(1);
  EXPECT_EQ(topology.text(), "1 node (8 cores)");
  EXPECT_FALSE(topology.binds());
}

TEST_F(SysfsTree, OneCpuOfEachCoreComesFirst) {
  cpus(8);
  write("node/online", "0");
  write("node/has_memory", "0");
  node(0, "0-7", "10");
  for (const char* list : {"0,4", "1,5", "2,6", "3,7"}) core(list);
  const Topology topology = read();
  EXPECT_EQ(topology.nodes[0].cores, 4);
  EXPECT_EQ(topology.nodes[0].cpus, (Ids{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(topology.nodes[0].id, 0);
  // A mask of siblings alone still counts each core once.
  view_.cpus = {1, 4, 5};
  EXPECT_EQ(read().nodes[0].cores, 2);
  EXPECT_EQ(read().nodes[0].cpus, (Ids{1, 4, 5}));
}

TEST_F(SysfsTree, UnevenNodesShareByCores) {
  cpus(8);
  write("node/online", "0-1");
  write("node/has_memory", "0-1");
  node(0, "0-1", "10 21");
  node(1, "2-7", "21 10");
  const Topology topology = read();
  EXPECT_EQ(topology.first_of(0, 48), 0);
  EXPECT_EQ(topology.first_of(1, 48), 12);
  EXPECT_EQ(topology.first_of(2, 48), 48);
}

TEST_F(SysfsTree, CpusWithoutMemoryGoToTheNearestNode) {
  cpus(6);
  write("node/online", "0-3");
  write("node/has_memory", "0-2");
  node(0, "0-1", "10 20 20 40");
  node(1, "2-3", "20 10 20 15");
  node(2, "", "20 20 10 11");  // memory alone, and nearer: nobody there to read it
  node(3, "4-5", "40 15 11 10");
  const Topology topology = read();
  ASSERT_EQ(topology.nodes.size(), 2U);
  EXPECT_EQ(topology.nodes[0].cpus, (Ids{0, 1}));
  EXPECT_EQ(topology.nodes[1].cpus, (Ids{2, 3, 4, 5}));
}

TEST_F(SysfsTree, AffinityToOneNodeLeavesOne) {
  two_nodes();
  view_.cpus = {4, 5};
  const Topology topology = read();
  EXPECT_EQ(topology.text(), "1 node (2 cores)");
  EXPECT_EQ(topology.nodes[0].cpus, (Ids{4, 5}));
  EXPECT_EQ(topology.nodes[0].id, 1);
}

TEST_F(SysfsTree, CpusetOfOneMemoryNode) {
  two_nodes();
  view_.memory = {0};
  EXPECT_EQ(read().text(), "1 node (8 cores)");
  EXPECT_EQ(read().nodes[0].id, 0);
}

TEST_F(SysfsTree, BoundMemory) {
  two_nodes();
  view_.bound = {1};
  EXPECT_EQ(read().text(), "1 node (8 cores)");
  EXPECT_EQ(read().nodes[0].id, 1);
  view_.bound = {0, 1};
  EXPECT_EQ(read().nodes.size(), 2U);
}

TEST_F(SysfsTree, APolicyOfTheProcessComesFirst) {
  two_nodes();
  view_.own_policy = true;
  EXPECT_EQ(read().text(), "1 node (8 cores)");
  EXPECT_FALSE(read(2).binds());  // the number asked for, but not its pages
}

TEST_F(SysfsTree, NoCpuNearAnyAllowedMemory) {
  two_nodes();
  view_.memory = {7};
  EXPECT_EQ(read().text(), "1 node (8 cores)");
}

TEST_F(SysfsTree, AsManyAsAskedFor) {
  two_nodes();
  EXPECT_TRUE(read(2).binds());
  const Topology four = read(4);
  ASSERT_EQ(four.nodes.size(), 4U);
  EXPECT_FALSE(four.binds());
  EXPECT_EQ(four.nodes[3].cpus, (Ids{6, 7}));
  EXPECT_EQ(four.text(),
            "4 nodes: group 0 (2 cores), group 1 (2 cores), group 2 (2 cores), group 3 (2 cores)");
}

TEST_F(SysfsTree, GroupsHaveEqualShares) {
  cpus(5);
  const Topology topology = read(2);
  EXPECT_EQ(topology.nodes[0].cpus, (Ids{0, 1, 2}));
  EXPECT_EQ(topology.nodes[1].cpus, (Ids{3, 4}));
  EXPECT_EQ(topology.first_of(1, 48), 24);
}

TEST_F(SysfsTree, SiblingsStayInOneGroup) {
  cpus(8);
  for (const char* list : {"0,4", "1,5", "2,6", "3,7"}) core(list);
  EXPECT_EQ(read(2).nodes[0].cpus, (Ids{0, 1, 4, 5}));
  EXPECT_EQ(read(2).nodes[1].cpus, (Ids{2, 3, 6, 7}));
}

TEST_F(SysfsTree, MoreGroupsThanCores) {
  cpus(2);
  const Topology topology = read(4);
  ASSERT_EQ(topology.nodes.size(), 4U);
  for (const NumaNode& node : topology.nodes) EXPECT_EQ(node.cpus, (Ids{0, 1}));
  EXPECT_EQ(topology.first_of(1, 48), 12);
}

TEST(MachineTopology, IsReadOnce) {
  EXPECT_EQ(&machine_topology(2), &machine_topology(2));
  EXPECT_EQ(machine_topology(2).nodes.size(), 2U);
  EXPECT_EQ(machine_topology(1).nodes.size(), 1U);
  EXPECT_GE(machine_topology().nodes.size(), 1U);
}

TEST(MachineTopology, DefaultThreadsAreCoresWithinTheQuota) {
  EXPECT_GE(default_threads(), 1);
  EXPECT_LE(default_threads(), available_cpus());
  EXPECT_LE(default_threads(), machine_topology(1).cores());
}

}  // namespace
}  // namespace moesaic
