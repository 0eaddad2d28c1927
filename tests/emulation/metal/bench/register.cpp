// Gives the bench, whose main is called bench_main here, the fake device as a Mac gives it a real one.

#include "backend/builtin.hpp"

int bench_main(int count, char** words);

int main(int count, char** words) {
  const auto registration = moesaic::register_backend(moesaic::metal::create_backend());
  return bench_main(count, words);
}
