// Prints the instruction sets that this build and this CPU can run, one per line.

#include <iostream>

#include "cpu/isa.hpp"

int main() {
  for (const moesaic::CpuIsa isa : moesaic::cpu::supported_isas()) {
    std::cout << moesaic::name_of(isa) << '\n';
  }
}
