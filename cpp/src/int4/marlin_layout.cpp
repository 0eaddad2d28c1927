#include "int4/marlin_layout.hpp"

#include <algorithm>
#include <string>

#include "int4/columns.hpp"

namespace moesaic::int4 {
namespace {

/// The order of 8 values in a word: value kNibbles[i] lies in nibble i.
constexpr int kNibbles[8] = {0, 2, 4, 6, 1, 3, 5, 7};

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

[[noreturn]] void unsupported(const std::string& what, const std::string& expected,
                              const std::string& got) {
  throw UnsupportedError(Problem{
      .operation = "marlin layout", .what = what, .expected = expected, .got = got, .hint = {}});
}

/// Calls fn(i, k, n) for every code: code (k, n) is value i of the packed words, counted nibble
/// after nibble.
template <class Fn>
void for_codes(std::int64_t k, std::int64_t n, Fn&& fn) {
  const auto& perm = marlin_weight_perm();
  for (std::int64_t kt = 0; kt < k / kMarlinTileK; ++kt) {
    for (std::int64_t slab = 0; slab < n / kMarlinTileN; ++slab) {
      const std::int64_t first = (kt * n + slab * kMarlinTileN) * kMarlinTileK;
      for (std::int64_t i = 0; i < 1024; ++i) {
        const std::int64_t at = perm[index(i)];  // 256 * tile + 16 * row + column
        fn(first + i, kt * kMarlinTileK + at % 256 / 16,
           slab * kMarlinTileN + at / 256 * 16 + at % 16);
      }
    }
  }
}

/// Calls fn(i, column) for a row of N zero points: that of `column` is value i of the packed words.
template <class Fn>
void for_zeros(std::int64_t n, Fn&& fn) {
  const std::vector<std::int32_t> perm = marlin_scale_perm(true);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t interleaved = i / 8 * 8 + kNibbles[i % 8];
    fn(i, interleaved / 64 * 64 + perm[index(interleaved % 64)]);
  }
}

void check_size(std::int64_t k, std::int64_t n) {
  if (k % kMarlinTileK != 0) unsupported("K", "a multiple of 16", std::to_string(k));
  if (n % kMarlinTileN != 0) unsupported("N", "a multiple of 64", std::to_string(n));
}

std::vector<float> permute_scales(const Int4Matrix& m, const std::vector<float>& from,
                                  bool forward) {
  const std::vector<std::int32_t> perm = marlin_scale_perm(m.groups > 1);
  const auto run = static_cast<std::int64_t>(perm.size());
  std::vector<float> to(from.size());
  for (std::int64_t i = 0; i < m.groups * m.n; ++i) {
    const std::int64_t other = i / run * run + perm[index(i % run)];
    if (forward) {
      to[index(i)] = from[index(other)];
    } else {
      to[index(other)] = from[index(i)];
    }
  }
  return to;
}

}  // namespace

const std::array<std::int32_t, 1024>& marlin_weight_perm() {
  static const auto kPerm = [] {
    std::array<std::int32_t, 1024> plain{};
    std::size_t at = 0;
    for (int lane = 0; lane < 32; ++lane) {
      int fragment[8];
      int* to = fragment;
      for (const int block : {0, 1}) {
        const int row = 2 * (lane % 4);
        for (const int r : {row, row + 1, row + 8, row + 9}) {
          *to++ = 16 * r + lane / 4 + 8 * block;
        }
      }
      for (int tile = 0; tile < 4; ++tile) {
        for (const int f : fragment) plain[at++] = f + 256 * tile;
      }
    }
    std::array<std::int32_t, 1024> perm{};
    for (std::size_t i = 0; i < perm.size(); ++i) {
      perm[i] = plain[i / 8 * 8 + static_cast<std::size_t>(kNibbles[i % 8])];
    }
    return perm;
  }();
  return kPerm;
}

std::vector<std::int32_t> marlin_scale_perm(bool grouped) {
  std::vector<std::int32_t> perm;
  if (grouped) {
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) perm.push_back(i + 8 * j);
    }
    return perm;
  }
  for (int i = 0; i < 4; ++i) {
    for (const int j : {0, 1, 8, 9, 16, 17, 24, 25}) perm.push_back(2 * i + j);
  }
  return perm;
}

std::vector<std::uint32_t> pack_marlin_codes(const std::vector<std::uint8_t>& codes, std::int64_t k,
                                             std::int64_t n) {
  check_size(k, n);
  std::vector<std::uint32_t> words(index(k * n / 8));
  for_codes(k, n, [&](std::int64_t i, std::int64_t row, std::int64_t col) {
    words[index(i / 8)] |= static_cast<std::uint32_t>(codes[index(row * n + col)]) << 4 * (i % 8);
  });
  return words;
}

std::vector<std::uint8_t> unpack_marlin_codes(const std::vector<std::uint32_t>& words,
                                              std::int64_t k, std::int64_t n) {
  check_size(k, n);
  std::vector<std::uint8_t> codes(index(k * n));
  for_codes(k, n, [&](std::int64_t i, std::int64_t row, std::int64_t col) {
    codes[index(row * n + col)] =
        static_cast<std::uint8_t>(words[index(i / 8)] >> 4 * (i % 8) & 15U);
  });
  return codes;
}

std::vector<std::uint32_t> pack_marlin_zeros(const std::vector<std::uint8_t>& zeros,
                                             std::int64_t groups, std::int64_t n) {
  check_size(kMarlinTileK, n);
  std::vector<std::uint32_t> words(index(groups * n / 8));
  for (std::int64_t g = 0; g < groups; ++g) {
    for_zeros(n, [&](std::int64_t i, std::int64_t col) {
      const std::uint32_t zero = zeros[index(g * n + col)];
      if (zero > 15) unsupported("zero point", "at most 15", std::to_string(zero));
      words[index((g * n + i) / 8)] |= zero << 4 * (i % 8);
    });
  }
  return words;
}

std::vector<std::uint8_t> unpack_marlin_zeros(const std::vector<std::uint32_t>& words,
                                              std::int64_t groups, std::int64_t n) {
  std::vector<std::uint8_t> zeros(index(groups * n));
  for (std::int64_t g = 0; g < groups; ++g) {
    for_zeros(n, [&](std::int64_t i, std::int64_t col) {
      zeros[index(g * n + col)] =
          static_cast<std::uint8_t>(words[index((g * n + i) / 8)] >> 4 * (i % 8) & 15U);
    });
  }
  return zeros;
}

MarlinMatrix to_marlin(const Int4Matrix& matrix) {
  MarlinMatrix m;
  m.k = matrix.k;
  m.n = matrix.n;
  m.group_size = matrix.group_size;
  m.groups = matrix.groups;
  m.g_idx = matrix.g_idx;
  if (matrix.g_idx.empty()) {
    m.qweight = pack_marlin_codes(matrix.codes, m.k, m.n);
  } else {
    m.perm = sort_by_group(matrix.g_idx);
    std::vector<std::uint8_t> sorted(matrix.codes.size());
    for (std::int64_t i = 0; i < m.k; ++i) {
      const std::int64_t from = m.perm[index(i)];
      const std::int64_t group = matrix.g_idx[index(from)];
      if (group != i / m.group_size) {
        unsupported("g_idx", "groups of " + std::to_string(m.group_size) + " columns each",
                    "group " + std::to_string(group) + " at sorted column " + std::to_string(i));
      }
      std::copy_n(matrix.codes.begin() + from * m.n, m.n, sorted.begin() + i * m.n);
    }
    m.qweight = pack_marlin_codes(sorted, m.k, m.n);
  }
  m.scales = permute_scales(matrix, matrix.scales, true);
  if (std::any_of(matrix.zeros.begin(), matrix.zeros.end(), [](auto z) { return z != 8; })) {
    m.qzeros = pack_marlin_zeros(matrix.zeros, m.groups, m.n);
  }
  return m;
}

Int4Matrix from_marlin(const MarlinMatrix& matrix) {
  Int4Matrix m;
  m.k = matrix.k;
  m.n = matrix.n;
  m.group_size = matrix.group_size;
  m.groups = matrix.groups;
  m.g_idx = matrix.g_idx;
  const std::vector<std::uint8_t> sorted = unpack_marlin_codes(matrix.qweight, m.k, m.n);
  m.codes.resize(sorted.size());
  for (std::int64_t i = 0; i < m.k; ++i) {
    const std::int64_t to = matrix.perm.empty() ? i : matrix.perm[index(i)];
    std::copy_n(sorted.begin() + i * m.n, m.n, m.codes.begin() + to * m.n);
  }
  m.scales = permute_scales(m, matrix.scales, false);
  m.zeros = matrix.qzeros.empty() ? std::vector<std::uint8_t>(index(m.groups * m.n), 8)
                                  : unpack_marlin_zeros(matrix.qzeros, m.groups, m.n);
  return m;
}

}  // namespace moesaic::int4
