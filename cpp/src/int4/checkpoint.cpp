#include "int4/checkpoint.hpp"

#include <algorithm>
#include <vector>

namespace moesaic {

namespace int4 {
namespace {

/// Which nibble of an AWQ word holds column c of its 8.
constexpr int kAwqNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

std::string dims(std::int64_t a, std::int64_t b) {
  return "[" + std::to_string(a) + ", " + std::to_string(b) + "]";
}

bool dense(const ConstTensorView& view) {
  std::int64_t step = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.dim(i) != 1 && view.stride(i) != step) return false;
    step *= view.dim(i);
  }
  return true;
}

void check_tensor(const ConstTensorView& view, const std::string& name, std::int64_t rows,
                  std::int64_t cols) {
  require<ShapeError>(view.rank == 2 && view.dim(0) == rows && view.dim(1) == cols && dense(view),
                      [&] {
                        return Problem{.operation = "gptq",
                                       .what = name,
                                       .expected = dims(rows, cols) + ", dense",
                                       .got = describe(view),
                                       .hint = dense(view) ? "" : "make it contiguous"};
                      });
  require<ShapeError>(view.data != nullptr, [&] {
    return Problem{
        .operation = "gptq", .what = name, .expected = "data", .got = "null", .hint = {}};
  });
  require<DeviceError>(view.device.type == DeviceType::Cpu, [&] {
    return Problem{.operation = "gptq",
                   .what = name,
                   .expected = "host memory",
                   .got = to_string(view.device),
                   .hint = {}};
  });
}

void check_words(const ConstTensorView& view, const std::string& name) {
  require<DTypeError>(view.dtype == DType::I32, [&] {
    return Problem{.operation = "gptq",
                   .what = name,
                   .expected = "i32",
                   .got = name_of(view.dtype),
                   .hint = {}};
  });
}

}  // namespace

std::int64_t count_groups(std::int64_t k, std::int64_t group_size) {
  return group_size < 0 || group_size >= k ? 1 : (k + group_size - 1) / group_size;
}

std::vector<std::int32_t> read_g_idx(const ConstTensorView& g_idx, std::int64_t k,
                                     std::int64_t groups, const std::string& name) {
  require<ShapeError>(g_idx.rank == 1 && g_idx.dim(0) == k && dense(g_idx), [&] {
    return Problem{.operation = "gptq",
                   .what = name,
                   .expected = "[" + std::to_string(k) + "], dense",
                   .got = describe(g_idx),
                   .hint = {}};
  });
  check_words(g_idx, name);
  // Copied before they are checked, since another thread may change the caller's.
  const auto* from = static_cast<const std::int32_t*>(g_idx.data);
  std::vector<std::int32_t> values(from, from + k);
  for (std::int64_t i = 0; i < k; ++i) {
    require<FormatError>(values[i] >= 0 && values[i] < groups, [&] {
      return Problem{.operation = "gptq",
                     .what = name + "[" + std::to_string(i) + "]",
                     .expected = "a group of 0 .. " + std::to_string(groups - 1),
                     .got = std::to_string(values[i]),
                     .hint = {}};
    });
  }
  return values;
}

GptqTensors expert_slice(const GptqTensors& tensors, std::int32_t expert) {
  GptqTensors one = tensors;
  const auto slice = [&](ConstTensorView& view, int rank) {
    if (view.data == nullptr || view.rank != rank) return;
    require<ShapeError>(expert >= 0 && expert < view.dim(0), [&] {
      return Problem{.operation = "gptq",
                     .what = "expert " + std::to_string(expert),
                     .expected = "one of " + std::to_string(view.dim(0)),
                     .got = describe(view),
                     .hint = {}};
    });
    view.data = static_cast<const std::byte*>(view.data) +
                expert * view.stride(0) * static_cast<std::int64_t>(size_of(view.dtype));
    for (int i = 0; i + 1 < rank; ++i) {
      view.shape[static_cast<std::size_t>(i)] = view.shape[static_cast<std::size_t>(i + 1)];
      view.strides[static_cast<std::size_t>(i)] = view.strides[static_cast<std::size_t>(i + 1)];
    }
    view.rank = rank - 1;
  };
  slice(one.qweight, 3);
  slice(one.scales, 3);
  slice(one.qzeros, 3);
  slice(one.g_idx, 2);
  return one;
}

LinearSize linear_size(const GptqTensors& tensors, const std::string& name) {
  const ConstTensorView& q = tensors.qweight;
  require<ShapeError>(q.rank >= 2 && q.dim(q.rank - 2) >= 1 && q.dim(q.rank - 1) >= 1, [&] {
    return Problem{.operation = "gptq",
                   .what = name + ".qweight",
                   .expected = "[K/8, N]; awq: [K, N/8]; pack_quantized: [N, K/8]",
                   .got = describe(q),
                   .hint = {}};
  });
  // No more than this could be asked for below, and eight times as much still fits.
  const std::int64_t rows = std::min<std::int64_t>(q.dim(q.rank - 2), INT32_MAX);
  const std::int64_t cols = std::min<std::int64_t>(q.dim(q.rank - 1), INT32_MAX);
  LinearSize size{rows * 8, cols};
  if (tensors.format == CheckpointFormat::Awq) size = {rows, cols * 8};
  if (tensors.format == CheckpointFormat::PackQuantized) size = {cols * 8, rows};
  require<ShapeError>(size.k < INT32_MAX && size.n < INT32_MAX, [&] {
    return Problem{.operation = "gptq",
                   .what = name + ".qweight",
                   .expected = "K and N below 2^31",
                   .got = describe(q),
                   .hint = {}};
  });
  require<UnsupportedError>(size.k % 8 == 0, [&] {
    return Problem{.operation = "gptq",
                   .what = name + " K",
                   .expected = "a multiple of 8",
                   .got = std::to_string(size.k),
                   .hint = {}};
  });
  return size;
}

LinearReader::LinearReader(const GptqTensors& tensors, const std::string& name)
    : format_(tensors.format),
      scale_dtype_(tensors.scales.dtype),
      qweight_(static_cast<const std::uint32_t*>(tensors.qweight.data)),
      scales_(tensors.scales.data),
      qzeros_(static_cast<const std::uint32_t*>(tensors.qzeros.data)) {
  const LinearSize size = linear_size(tensors, name);
  k_ = size.k;
  n_ = size.n;
  require<ShapeError>(tensors.group_size == -1 || tensors.group_size >= 1, [&] {
    return Problem{.operation = "gptq",
                   .what = name + " group_size",
                   .expected = "-1 or at least 1",
                   .got = std::to_string(tensors.group_size),
                   .hint = {}};
  });
  groups_ = count_groups(k_, tensors.group_size);
  zero_words_ = (n_ + 7) / 8;
  check_words(tensors.qweight, name + ".qweight");
  switch (format_) {
    case CheckpointFormat::Awq:
      check_tensor(tensors.qweight, name + ".qweight", k_, n_ / 8);
      break;
    case CheckpointFormat::PackQuantized:
      check_tensor(tensors.qweight, name + ".qweight", n_, k_ / 8);
      break;
    default:
      check_tensor(tensors.qweight, name + ".qweight", k_ / 8, n_);
  }
  const bool by_row = format_ == CheckpointFormat::PackQuantized;
  check_tensor(tensors.scales, name + ".scales", by_row ? n_ : groups_, by_row ? groups_ : n_);
  require<DTypeError>(
      scale_dtype_ == DType::F16 || scale_dtype_ == DType::BF16 || scale_dtype_ == DType::F32, [&] {
        return Problem{.operation = "gptq",
                       .what = name + ".scales",
                       .expected = "f16, bf16 or f32",
                       .got = name_of(scale_dtype_),
                       .hint = {}};
      });
  if (qzeros_ != nullptr) {
    check_words(tensors.qzeros, name + ".qzeros");
    check_tensor(tensors.qzeros, name + ".qzeros", by_row ? zero_words_ : groups_,
                 by_row ? groups_ : zero_words_);
  }
}

void LinearReader::codes(std::int64_t k, std::int64_t n, int count, std::uint32_t* out) const {
  if (format_ == CheckpointFormat::Awq) {
    const std::uint32_t* words = qweight_ + k * (n_ / 8);
    for (int i = 0; i < count; ++i) {
      out[i] = words[(n + i) / 8] >> (4 * kAwqNibble[(n + i) % 8]) & 15U;
    }
    return;
  }
  const int shift = 4 * static_cast<int>(k % 8);
  if (format_ == CheckpointFormat::PackQuantized) {
    const std::uint32_t* words = qweight_ + n * (k_ / 8) + k / 8;
    for (int i = 0; i < count; ++i) out[i] = words[i * (k_ / 8)] >> shift & 15U;
    return;
  }
  const std::uint32_t* words = qweight_ + k / 8 * n_ + n;
  for (int i = 0; i < count; ++i) out[i] = words[i] >> shift & 15U;
}

float LinearReader::scale(std::int64_t group, std::int64_t n) const {
  const bool by_row = format_ == CheckpointFormat::PackQuantized;
  const std::int64_t at = by_row ? n * groups_ + group : group * n_ + n;
  if (scale_dtype_ == DType::F32) return static_cast<const float*>(scales_)[at];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(scales_)[at];
  return scale_dtype_ == DType::F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

int LinearReader::zero(std::int64_t group, std::int64_t n) const {
  if (qzeros_ == nullptr) return kSymmetricZero;
  const bool by_row = format_ == CheckpointFormat::PackQuantized;
  const std::uint32_t word =
      qzeros_[by_row ? n / 8 * groups_ + group : group * zero_words_ + n / 8];
  const int at = static_cast<int>(n % 8);
  const int nibble = format_ == CheckpointFormat::Awq ? kAwqNibble[at] : at;
  return static_cast<int>(word >> (4 * nibble) & 15U) + (format_ == CheckpointFormat::Gptq ? 1 : 0);
}

bool LinearReader::symmetric() const {
  for (std::int64_t g = 0; g < groups_; ++g) {
    for (std::int64_t n = 0; n < n_; ++n) {
      if (zero(g, n) != kSymmetricZero) return false;
    }
  }
  return true;
}

}  // namespace int4

float Int4Matrix::value(std::int64_t row, std::int64_t col) const {
  const auto at = static_cast<std::size_t>(group_of(row) * n + col);
  const int code = codes[static_cast<std::size_t>(row * n + col)];
  return static_cast<float>(code - zeros[at]) * scales[at];
}

Int4Matrix unpack_gptq(const GptqTensors& tensors, std::int32_t expert) {
  const GptqTensors one = int4::expert_slice(tensors, expert);
  const int4::LinearReader reader(one, "tensors");
  Int4Matrix m;
  m.k = reader.k();
  m.n = reader.n();
  m.groups = reader.groups();
  m.group_size = tensors.group_size < 0 ? m.k : tensors.group_size;
  m.codes.resize(static_cast<std::size_t>(m.k * m.n));
  std::vector<std::uint32_t> row(static_cast<std::size_t>(m.n));
  for (std::int64_t k = 0; k < m.k; ++k) {
    reader.codes(k, 0, static_cast<int>(m.n), row.data());
    for (std::int64_t n = 0; n < m.n; ++n) {
      m.codes[static_cast<std::size_t>(k * m.n + n)] =
          static_cast<std::uint8_t>(row[static_cast<std::size_t>(n)]);
    }
  }
  for (std::int64_t g = 0; g < m.groups; ++g) {
    for (std::int64_t n = 0; n < m.n; ++n) {
      m.scales.push_back(reader.scale(g, n));
      m.zeros.push_back(static_cast<std::uint8_t>(reader.zero(g, n)));
    }
  }
  if (one.g_idx.data != nullptr) m.g_idx = int4::read_g_idx(one.g_idx, m.k, m.groups, "g_idx");
  return m;
}

}  // namespace moesaic
