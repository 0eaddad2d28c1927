#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "moesaic/error.hpp"

namespace moesaic {

/// The product of sizes that came from outside. Throws ShapeError when one is negative or the
/// product does not fit: wrapped, it would pass a comparison with the memory that is there.
inline std::int64_t product_of(std::initializer_list<std::int64_t> sizes, const char* operation,
                               const std::string& what) {
  std::int64_t product = 1;
  bool fits = true;
  bool empty = false;
  std::string text;
  for (const std::int64_t size : sizes) {
    text += (text.empty() ? "" : " * ") + std::to_string(size);
    empty = empty || size == 0;
    fits = fits && size >= 0 && !__builtin_mul_overflow(product, size == 0 ? 1 : size, &product);
  }
  require<ShapeError>(fits, [&] {
    return Problem{.operation = operation,
                   .what = what,
                   .expected = "a product of sizes that fits in 63 bits",
                   .got = text,
                   .hint = {}};
  });
  return empty ? 0 : product;
}

}  // namespace moesaic
