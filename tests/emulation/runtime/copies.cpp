// Asynchronous copies: queued at issue, landed at some legal moment, at the latest by the wait.
#include <utility>

#include "runtime/block.hpp"
#include "runtime/sanitizers.hpp"

namespace moesaic::emulation {

void Block::land(const Copy& copy) {
  const Seen seen;
  copy.body(copy.shared, copy.global);
}

void Block::land(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) land(copy);
  copies.clear();
}

void Block::land_some(std::vector<Copy>& copies) {
  if (!copies_wander_) return;
  std::size_t kept = 0;
  for (const Copy& copy : copies) {
    if (random_.below(4) == 0) {
      land(copy);
    } else {
      copies[kept++] = copy;
    }
  }
  copies.resize(kept);
}

void Block::copy_async(Copy copy, Site site) {
  running().open_copies.push_back(copy);
  running().site = site;
  land_some(running().open_copies);
}

void Block::copy_commit() {
  Thread& t = running();
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
  for (auto& group : t.copy_groups) land_some(group);
}

void Block::copy_wait(unsigned groups_left) {
  Thread& t = running();
  while (t.copy_groups.size() > groups_left) {
    land(t.copy_groups.front());
    t.copy_groups.erase(t.copy_groups.begin());
  }
}

void Block::arrive_after_copies(uint64_t* barrier, Site site) {
  running().arrivals.push_back({barrier, site});
  if (copies_wander_ && random_.below(4) == 0) complete_arrivals();
}

void Block::complete_arrivals() {
  Thread& t = running();
  if (t.arrivals.empty()) return;
  for (auto& group : t.copy_groups) land(group);
  land(t.open_copies);
  const auto arrivals = std::move(t.arrivals);
  t.arrivals.clear();
  for (const Arrival& arrival : arrivals) mbarrier_arrive(arrival.barrier, arrival.site);
}

}  // namespace moesaic::emulation
