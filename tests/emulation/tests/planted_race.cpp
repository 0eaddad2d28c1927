// planted_race <mistake>: one in-order run of a kernel with that mistake, or of all kernels without
// one for the word "none". Compiled with ThreadSanitizer, which must report a data race, or none.
#include <cstdio>
#include <cstring>

#include "planted.hpp"

int main(int argc, char** argv) {
  using namespace moesaic::planted;
  const char* wanted = argc == 2 ? argv[1] : "";
  bool known = false;
  for (const Plant& plant : kPlants) {
    const bool none = std::strcmp(wanted, "none") == 0;
    if (!none && std::strcmp(wanted, plant.name) != 0) continue;
    known = true;
    try {
      (none ? plant.is_right_without : plant.is_right)();
    } catch (const moesaic::emulation::Fault& fault) {
      std::printf("%s: %s\n", plant.name, fault.what());
    }
  }
  if (!known) std::fprintf(stderr, "usage: planted_race none|<mistake>\n");
  return known ? 0 : 2;
}
