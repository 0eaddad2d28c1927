#include "offload/stored_rows.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/error.hpp"
#include "moesaic/types.hpp"
#include "quant/codebooks.hpp"

namespace moesaic::offload {
namespace {

constexpr std::int64_t kMxfp4Cols = 32;
constexpr std::int64_t kNvfp4Cols = 16;
constexpr std::int64_t kQ4Cols = 32;
/// Rows that are gathered together from columns, so that each cache line is read once.
constexpr std::int64_t kTogether = 32;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void refuse(const std::string& name, std::string expected, std::string got) {
  throw FormatError(Problem{.operation = "MoeExpertStore",
                            .what = "tensors of '" + name + "'",
                            .expected = std::move(expected),
                            .got = std::move(got),
                            .hint = {}});
}

std::int64_t code_bytes(ScaleType type) {
  switch (type) {
    case ScaleType::F64:
      return 8;
    case ScaleType::F32:
      return 4;
    case ScaleType::F16:
    case ScaleType::Bf16:
      return 2;
    case ScaleType::E8m0:
      return 1;
  }
  return 0;
}

template <class T>
T read_as(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

/// 2^(code - 127); the least of them is no normal number.
float power_of_two(int code) {
  return code == 0 ? std::bit_cast<float>(std::uint32_t{0x00400000})
                   : std::bit_cast<float>(static_cast<std::uint32_t>(code) << 23);
}

float scale_at(const std::byte* scales, ScaleType type, std::int64_t i, const std::string& name) {
  const std::byte* const at = scales + i * code_bytes(type);
  switch (type) {
    case ScaleType::F32:
      return read_as<float>(at);
    case ScaleType::F16:
      return f16_to_f32(read_as<std::uint16_t>(at));
    case ScaleType::Bf16:
      return bf16_to_f32(read_as<std::uint16_t>(at));
    case ScaleType::F64:
      return static_cast<float>(read_as<double>(at));
    case ScaleType::E8m0:
      break;
  }
  const int code = std::to_integer<int>(*at);
  if (code == 255) refuse(name, "E8M0 scales of 0 to 254", "255");
  return power_of_two(code);
}

using Table = std::array<float, 256>;

Table table_of(Code8 code) {
  Table table{};
  for (int i = 0; i < 256; ++i) {
    float& value = table[static_cast<std::size_t>(i)];
    switch (code) {
      case Code8::Int8:
        value = static_cast<float>(static_cast<std::int8_t>(i));
        break;
      case Code8::E5m2:  // the upper byte of F16
        value = f16_to_f32(static_cast<std::uint16_t>(i << 8));
        break;
      case Code8::E4m3:
        value = quant::e4m3(static_cast<std::uint8_t>(i));
        break;
    }
  }
  return table;
}

const Table& shared_table(Code8 code) {
  static const std::array<Table, 3> tables{table_of(Code8::E4m3), table_of(Code8::E5m2),
                                           table_of(Code8::Int8)};
  return tables[static_cast<std::size_t>(code)];
}

std::int64_t matrix_row(const StoredRole& role, std::int64_t r) {
  return role.first_row + r * role.row_step;
}

std::int64_t grid_columns(const StoredRole& role, std::int64_t cols) {
  return ceil_div(cols, role.grid_cols);
}

std::int64_t grid_part_rows(const StoredRole& role) {
  return ceil_div(role.matrix_rows / role.grid_parts, role.grid_rows);
}

void decode_floats(const StoredRole& role, std::int64_t rows, std::int64_t cols,
                   const std::byte* values, std::byte* to) {
  const std::int64_t size = row_bytes(role.type, 1);
  const std::int64_t row = cols * size;
  if (!role.transposed) {
    for (std::int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * row, values + matrix_row(role, r) * row, static_cast<std::size_t>(row));
    }
    return;
  }
  const auto gather = [&]<class T>(T) {
    for (std::int64_t first = 0; first < rows; first += kTogether) {
      const std::int64_t last = std::min(rows, first + kTogether);
      for (std::int64_t c = 0; c < cols; ++c) {
        const std::byte* const from = values + c * role.matrix_rows * size;
        for (std::int64_t r = first; r < last; ++r) {
          const T value = read_as<T>(from + matrix_row(role, r) * size);
          std::memcpy(to + r * row + c * size, &value, sizeof(T));
        }
      }
    }
  };
  if (size == 2) {
    gather(std::uint16_t{});
  } else {
    gather(std::uint32_t{});
  }
}

bool is_finite(std::uint32_t bits) { return (bits & 0x7F800000) != 0x7F800000; }

/// The nearest BF16 of a finite f32, ties to even.
std::uint16_t nearest_bf16(std::uint32_t bits) {
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/// Every code under one scale.
struct ScaledCodes {
  std::array<std::uint16_t, 256> values;
  std::array<std::uint8_t, 256> bad;  ///< 1: no finite number

  void fill(const Table& table, float scale) {
    for (std::size_t code = 0; code < table.size(); ++code) {
      const auto bits = std::bit_cast<std::uint32_t>(table[code] * scale);
      values[code] = nearest_bf16(bits);
      bad[code] = is_finite(bits) ? 0 : 1;
    }
  }
};

/// The scale in a row of their grid, as it multiplies codes.
float grid_scale(const StoredRole& role, const std::byte* scales, std::int64_t grid_row,
                 std::int64_t columns, std::int64_t column, const std::string& name) {
  const float scale =
      scale_at(scales, role.scale, grid_row * columns + column, name) * role.scale_factor;
  if (!std::isfinite(scale)) refuse(name, "scales that are finite in f32", "others");
  return scale;
}

/// The row of the grid that has the scales of row `m` of the matrix.
std::int64_t grid_row_of(const StoredRole& role, std::int64_t m) {
  const std::int64_t part_rows = role.matrix_rows / role.grid_parts;
  return m / part_rows * grid_part_rows(role) + m % part_rows / role.grid_rows;
}

[[noreturn]] void refuse_products(const std::string& name) {
  refuse(name, "numbers whose products with their scales f32 holds", "others");
}

/// Codes as they are, in blocks behind their scale.
void decode_e4m3(const StoredRole& role, std::int64_t rows, std::int64_t cols,
                 const std::byte* values, const std::byte* scales, const std::string& name,
                 std::byte* to) {
  constexpr std::int64_t kBlock = 128;
  const Table& table = shared_table(Code8::E4m3);
  const std::int64_t columns = grid_columns(role, cols);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t m = matrix_row(role, r);
    const std::int64_t grid_row = grid_row_of(role, m);
    for (std::int64_t c = 0; c < cols; c += kBlock) {
      const float scale = grid_scale(role, scales, grid_row, columns, c / role.grid_cols, name);
      const auto* codes = reinterpret_cast<const std::uint8_t*>(values) + m * cols + c;
      unsigned bad = 0;
      for (std::int64_t i = 0; i < kBlock; ++i) bad |= (codes[i] & 0x7F) == 0x7F ? 1U : 0U;
      if (!std::isfinite(scale * quant::kLargestE4m3)) {
        for (std::int64_t i = 0; i < kBlock; ++i) {
          bad |= std::isfinite(scale * table[codes[i]]) ? 0U : 1U;
        }
      }
      if (bad != 0) refuse_products(name);
      std::memcpy(to, &scale, sizeof(scale));
      std::memcpy(to + sizeof(scale), codes, kBlock);
      to += sizeof(scale) + kBlock;
    }
  }
}

void decode_codes(const StoredRole& role, std::int64_t rows, std::int64_t cols,
                  const std::byte* values, const std::byte* scales, const std::string& name,
                  std::byte* to) {
  // Under a scale of many values its products are looked up, which are fewer than these.
  constexpr std::int64_t kMany = 1024;
  const bool looked_up = role.grid_rows * std::min(role.grid_cols, cols) >= kMany;
  const Table& table = shared_table(role.code);
  const std::int64_t columns = grid_columns(role, cols);
  std::vector<ScaledCodes> products(looked_up ? static_cast<std::size_t>(columns) : 0);
  std::int64_t products_of = -1;  // the row of the grid whose scales are in `products`
  const auto scale_of = [&](std::int64_t grid_row, std::int64_t g) {
    return grid_scale(role, scales, grid_row, columns, g, name);
  };
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t m = matrix_row(role, r);
    const std::int64_t grid_row = grid_row_of(role, m);
    const auto* codes = reinterpret_cast<const std::uint8_t*>(values) + m * cols;
    if (looked_up && grid_row != products_of) {
      for (std::int64_t g = 0; g < columns; ++g) {
        products[static_cast<std::size_t>(g)].fill(table, scale_of(grid_row, g));
      }
      products_of = grid_row;
    }
    unsigned bad = 0;
    for (std::int64_t g = 0; g < columns; ++g) {
      const std::int64_t begin = g * role.grid_cols;
      const std::int64_t end = std::min(cols, begin + role.grid_cols);
      const auto put = [&](std::int64_t c, std::uint16_t value) {
        std::memcpy(out + 2 * c, &value, 2);
      };
      if (looked_up) {
        const ScaledCodes& product = products[static_cast<std::size_t>(g)];
        for (std::int64_t c = begin; c < end; ++c) {
          put(c, product.values[codes[c]]);
          bad |= product.bad[codes[c]];
        }
        continue;
      }
      const float scale = scale_of(grid_row, g);
      for (std::int64_t c = begin; c < end; ++c) {
        const auto bits = std::bit_cast<std::uint32_t>(table[codes[c]] * scale);
        put(c, nearest_bf16(bits));
        bad |= is_finite(bits) ? 0U : 1U;
      }
    }
    if (bad != 0) refuse_products(name);
    out += 2 * cols;
  }
}

/// `count` bytes of neighbours as bytes of half groups: column j and the one `count` further.
void write_halves(const std::uint8_t* packed, std::int64_t count, std::uint8_t* to) {
  for (std::int64_t j = 0; j < count; ++j) {
    const auto nibble = [&](std::int64_t c) { return packed[c / 2] >> (c % 2 * 4) & 15; };
    to[j] = static_cast<std::uint8_t>(nibble(j) | nibble(j + count) << 4);
  }
}

void decode_mxfp4(const StoredRole& role, std::int64_t rows, std::int64_t cols,
                  const std::byte* values, const std::byte* scales, const std::string& name,
                  std::byte* to) {
  const std::int64_t blocks = cols / kMxfp4Cols;
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t first = matrix_row(role, r) * blocks;
    const auto* packed = reinterpret_cast<const std::uint8_t*>(values) + first * kMxfp4Cols / 2;
    const auto* scale = reinterpret_cast<const std::uint8_t*>(scales) + first;
    for (std::int64_t b = 0; b < blocks; ++b, packed += kMxfp4Cols / 2, out += 17) {
      if (scale[b] == 255) refuse(name, "E8M0 scales of 0 to 254", "255");
      out[0] = scale[b];
      write_halves(packed, kMxfp4Cols / 2, out + 1);
    }
  }
}

void decode_nvfp4(const StoredRole& role, std::int64_t rows, std::int64_t cols,
                  const std::byte* values, const std::byte* scales, const std::string& name,
                  std::byte* to) {
  const std::int64_t groups = cols / kNvfp4Cols;
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t first = matrix_row(role, r) * groups;
    const auto* packed = reinterpret_cast<const std::uint8_t*>(values) + first * kNvfp4Cols / 2;
    const auto* scale = reinterpret_cast<const std::uint8_t*>(scales) + first;
    for (std::int64_t g = 0; g < groups; g += 4, out += 36) {
      for (std::int64_t i = 0; i < 4; ++i, packed += kNvfp4Cols / 2) {
        if (scale[g + i] >= 0x7F) refuse(name, "scales of 0x00 to 0x7E", "negative ones or NaN");
        out[i] = scale[g + i];
        write_halves(packed, kNvfp4Cols / 2, out + 4 + i * kNvfp4Cols / 2);
      }
    }
  }
}

void decode_q4(const StoredRole& role, std::int64_t rows, std::int64_t cols,
               const std::byte* values, const std::byte* scales, const std::string& name,
               std::byte* to) {
  const std::int64_t blocks = cols / kQ4Cols;
  const std::int64_t group_size = role.group_size < 0 ? cols : role.group_size;
  const std::int64_t groups = ceil_div(cols, group_size);
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t m = matrix_row(role, r);
    const auto* packed = reinterpret_cast<const std::uint8_t*>(values) + m * cols / 2;
    for (std::int64_t b = 0; b < blocks; ++b, packed += kQ4Cols / 2, out += 18) {
      const std::int64_t group = b * kQ4Cols / group_size;
      const std::uint16_t scale =
          f32_to_f16(scale_at(scales, role.scale, m * groups + group, name));
      std::memcpy(out, &scale, 2);
      write_halves(packed, kQ4Cols / 2, out + 2);
    }
  }
}

}  // namespace

StoredBytes stored_bytes(const StoredRole& role, std::int64_t rows, std::int64_t cols) {
  const std::int64_t n = role.matrix_rows;
  switch (role.form) {
    case StoredForm::Rows:
    case StoredForm::Floats:
      return {n * row_bytes(role.type, cols), 0, 0};
    case StoredForm::Codes8:
      return {n * cols,
              role.grid_parts * grid_part_rows(role) * grid_columns(role, cols) *
                  code_bytes(role.scale),
              0};
    case StoredForm::Mxfp4:
      return {n * cols / 2, n * cols / kMxfp4Cols, 0};
    case StoredForm::Nvfp4:
      return {n * cols / 2, n * cols / kNvfp4Cols, 0};
    case StoredForm::Q4Words:
    case StoredForm::Int4:
      break;
  }
  const std::int64_t group_size = role.group_size < 0 ? cols : role.group_size;
  const std::int64_t groups = ceil_div(cols, group_size);
  if (role.form == StoredForm::Q4Words) {
    return {n * cols / 2, n * groups * code_bytes(role.scale), 0};
  }
  return {rows * cols / 2, rows * groups * code_bytes(role.scale),
          role.zeros < 0 ? 0 : ceil_div(rows, 8) * groups * 4};
}

void decode_rows(const StoredRole& role, std::int64_t rows, std::int64_t cols,
                 const std::byte* values, const std::byte* scales, const std::string& name,
                 std::byte* to) {
  switch (role.form) {
    case StoredForm::Floats:
      return decode_floats(role, rows, cols, values, to);
    case StoredForm::Codes8:
      return role.type == QuantType::E4M3
                 ? decode_e4m3(role, rows, cols, values, scales, name, to)
                 : decode_codes(role, rows, cols, values, scales, name, to);
    case StoredForm::Mxfp4:
      return decode_mxfp4(role, rows, cols, values, scales, name, to);
    case StoredForm::Nvfp4:
      return decode_nvfp4(role, rows, cols, values, scales, name, to);
    case StoredForm::Q4Words:
      return decode_q4(role, rows, cols, values, scales, name, to);
    case StoredForm::Rows:
    case StoredForm::Int4:
      break;  // need no rows
  }
}

}  // namespace moesaic::offload
