#include "int4/p4_layout.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "int4/columns.hpp"

namespace moesaic::int4 {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }
std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

/// Where a code lies: a byte, and the shift of its nibble in it.
struct Nibble {
  std::int64_t byte;
  int shift;
};
/// Where a unit holds the code of its row and k.
Nibble unit_nibble(std::int64_t row, std::int64_t k) {
  const std::int64_t lane = row % 8 * 4 + k % 8 / 2;
  const std::int64_t word = lane * 4 + k / 16;
  const int nibble = static_cast<int>(row / 8 + 2 * (k % 16 / 8) + 4 * (k % 2));
  return {word * 4 + nibble / 2, nibble % 2 * 4};
}

/// Index of a row's scale among the 16 scales of a group.
std::int64_t scale_index(std::int64_t row) { return row % 8 * 2 + row / 8; }

/// Where the codes, scales and zero points of one matrix lie, in bytes from its start.
class Positions {
 public:
  explicit Positions(const P4Matrix& m)
      : m_(m),
        single_(m.groups == 1),
        chunk_cols_(!single_ && m.group_size == 128 ? 128 : 64),
        chunk_groups_(single_ ? 0 : chunk_cols_ / m.group_size),
        scale_bytes_(m.scale_f32 ? 4 : 2) {}

  std::int64_t row_block_bytes() const {
    const std::int64_t chunks = (m_.packed_cols + chunk_cols_ - 1) / chunk_cols_;
    return m_.packed_cols / kP4Cols * kP4UnitBytes +
           chunks * chunk_groups_ * kP4Rows * (scale_bytes_ + (m_.asymmetric ? 1 : 0));
  }
  /// The packed row of output column n.
  std::int64_t row(std::int64_t n) const {
    if (!m_.interleaved) return n;
    const std::int64_t half = m_.n / 2, j = n % half;
    return j / 8 * 16 + j % 8 + (n >= half ? 8 : 0);
  }
  Nibble code(std::int64_t row, std::int64_t k) const {
    const Nibble at = unit_nibble(row % kP4Rows, k % kP4Cols);
    const std::int64_t unit = k % chunk_cols_ / kP4Cols;
    return {chunk(row, k / chunk_cols_) + unit * kP4UnitBytes + at.byte, at.shift};
  }
  std::int64_t scale(std::int64_t row, std::int64_t group) const {
    if (single_) return (row / kP4Rows * kP4Rows + scale_index(row % kP4Rows)) * scale_bytes_;
    const std::int64_t c = group / chunk_groups_;
    return scales(row, c) +
           (group % chunk_groups_ * kP4Rows + scale_index(row % kP4Rows)) * scale_bytes_;
  }
  std::int64_t zero(std::int64_t row, std::int64_t group) const {
    if (single_) return row / kP4Rows * kP4Rows + scale_index(row % kP4Rows);
    const std::int64_t c = group / chunk_groups_;
    return scales(row, c) + chunk_groups_ * kP4Rows * scale_bytes_ +
           group % chunk_groups_ * kP4Rows + scale_index(row % kP4Rows);
  }

 private:
  std::int64_t chunk(std::int64_t row, std::int64_t c) const {
    const std::int64_t full = chunk_cols_ / kP4Cols * kP4UnitBytes +
                              chunk_groups_ * kP4Rows * (scale_bytes_ + (m_.asymmetric ? 1 : 0));
    return row / kP4Rows * m_.row_block_bytes + c * full;
  }
  std::int64_t scales(std::int64_t row, std::int64_t c) const {
    const std::int64_t left = m_.packed_cols - c * chunk_cols_;
    return chunk(row, c) + std::min(left, chunk_cols_) / kP4Cols * kP4UnitBytes;
  }

  const P4Matrix& m_;
  bool single_;
  std::int64_t chunk_cols_, chunk_groups_, scale_bytes_;
};

[[noreturn]] void unsupported(const std::string& what, const std::string& expected,
                              const std::string& got) {
  throw UnsupportedError(Problem{
      .operation = "p4 layout", .what = what, .expected = expected, .got = got, .hint = {}});
}

void put_scale(std::uint8_t* to, float value, bool wide) {
  const std::uint16_t half = f32_to_f16(value);
  std::memcpy(to, wide ? static_cast<const void*>(&value) : &half, wide ? 4 : 2);
}
float get_scale(const std::uint8_t* from, bool wide) {
  float value;
  std::uint16_t half;
  std::memcpy(wide ? static_cast<void*>(&value) : &half, from, wide ? 4 : 2);
  return wide ? value : f16_to_f32(half);
}

}  // namespace

P4Matrix to_p4(const Int4Matrix& matrix, bool interleave_gate_up) {
  P4Matrix m;
  m.k = matrix.k;
  m.n = matrix.n;
  m.group_size = matrix.group_size;
  m.groups = matrix.groups;
  m.g_idx = matrix.g_idx;
  m.interleaved = interleave_gate_up;
  const bool known =
      m.groups == 1 || m.group_size == 32 || m.group_size == 64 || m.group_size == 128;
  if (!known) unsupported("group size", "32, 64, 128 or K", std::to_string(m.group_size));
  if (interleave_gate_up && m.n % 16 != 0) {
    unsupported("interleaved N", "a multiple of 16", std::to_string(m.n));
  }
  m.scale_f32 = std::any_of(matrix.scales.begin(), matrix.scales.end(),
                            [](float s) { return f16_to_f32(f32_to_f16(s)) != s; });
  m.asymmetric =
      std::any_of(matrix.zeros.begin(), matrix.zeros.end(), [](auto z) { return z != 8; });
  m.packed_rows = round_up(m.n, kP4Rows);
  m.packed_cols = round_up(m.k, kP4Cols);
  if (!matrix.g_idx.empty()) {
    m.perm = sort_by_group(matrix.g_idx);
    for (std::int64_t i = 0; i < m.k; ++i) {
      const std::int64_t group = matrix.g_idx[index(m.perm[index(i)])];
      if (group == i / m.group_size) continue;
      unsupported("g_idx", "groups of " + std::to_string(m.group_size) + " columns each",
                  "group " + std::to_string(group) + " at sorted column " + std::to_string(i));
    }
  }
  m.row_block_bytes = Positions(m).row_block_bytes();
  const Positions positions(m);
  m.bytes.assign(index(m.packed_rows / kP4Rows * m.row_block_bytes), 0);
  if (m.groups == 1) {
    m.side_scales.assign(index(m.packed_rows * (m.scale_f32 ? 4 : 2)), 0);
    if (m.asymmetric) m.side_zeros.assign(index(m.packed_rows), 0);
  }
  std::vector<std::int64_t> column(index(m.packed_rows), -1);  // by packed row
  for (std::int64_t n = 0; n < m.n; ++n) column[index(positions.row(n))] = n;

  for (std::int64_t row = 0; row < m.packed_rows; ++row) {
    const std::int64_t n = column[index(row)];
    for (std::int64_t i = 0; i < m.packed_cols; ++i) {
      int code = 8;
      if (n >= 0 && i < m.k) {
        code = matrix.codes[index((m.perm.empty() ? i : m.perm[index(i)]) * m.n + n)];
      } else if (n >= 0 && (m.groups == 1 || i / m.group_size < m.groups)) {
        const std::int64_t group = m.groups == 1 ? 0 : i / m.group_size;
        code = std::min<int>(matrix.zeros[index(group * m.n + n)], 15);
      }
      const Nibble at = positions.code(row, i);
      m.bytes[index(at.byte)] |= static_cast<std::uint8_t>(code << at.shift);
    }
    if (n < 0) continue;
    std::vector<std::uint8_t>& scales = m.groups == 1 ? m.side_scales : m.bytes;
    std::vector<std::uint8_t>& zeros = m.groups == 1 ? m.side_zeros : m.bytes;
    for (std::int64_t g = 0; g < m.groups; ++g) {
      put_scale(&scales[index(positions.scale(row, g))], matrix.scales[index(g * m.n + n)],
                m.scale_f32);
      if (m.asymmetric) zeros[index(positions.zero(row, g))] = matrix.zeros[index(g * m.n + n)];
    }
  }
  return m;
}

Int4Matrix from_p4(const P4Matrix& matrix) {
  Int4Matrix m;
  m.k = matrix.k;
  m.n = matrix.n;
  m.group_size = matrix.group_size;
  m.groups = matrix.groups;
  m.g_idx = matrix.g_idx;
  m.codes.resize(index(m.k * m.n));
  m.scales.resize(index(m.groups * m.n));
  m.zeros.assign(index(m.groups * m.n), 8);
  const Positions positions(matrix);
  const std::vector<std::uint8_t>& scales = m.groups == 1 ? matrix.side_scales : matrix.bytes;
  const std::vector<std::uint8_t>& zeros = m.groups == 1 ? matrix.side_zeros : matrix.bytes;
  for (std::int64_t n = 0; n < m.n; ++n) {
    const std::int64_t row = positions.row(n);
    for (std::int64_t i = 0; i < m.k; ++i) {
      const Nibble at = positions.code(row, i);
      const std::int64_t k = matrix.perm.empty() ? i : matrix.perm[index(i)];
      m.codes[index(k * m.n + n)] = matrix.bytes[index(at.byte)] >> at.shift & 15;
    }
    for (std::int64_t g = 0; g < m.groups; ++g) {
      m.scales[index(g * m.n + n)] =
          get_scale(&scales[index(positions.scale(row, g))], matrix.scale_f32);
      if (matrix.asymmetric) m.zeros[index(g * m.n + n)] = zeros[index(positions.zero(row, g))];
    }
  }
  return m;
}

}  // namespace moesaic::int4
