#include "gguf/reader.hpp"

#include <bit>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "gguf/metadata.hpp"

namespace moesaic::gguf {
namespace {

constexpr std::uint32_t kDefaultAlignment = 32;
constexpr std::uint32_t kMaxDims = 4;
constexpr std::uint64_t kMaxKeyBytes = 65535;
constexpr std::uint64_t kMaxTensorNameBytes = 63;
constexpr std::uint64_t kMaxArrayElements = std::uint64_t{1} << 30;
constexpr std::uint64_t kMaxInt64 = std::numeric_limits<std::int64_t>::max();
// A key-value pair takes at least its length, 1 byte of key, its type and 1 byte of value; a tensor
// info its length, 1 byte of name, the number of dimensions, its type and offset. So the bytes left
// in a file bound how many of them it can have.
constexpr std::uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;
constexpr std::uint64_t kMinTensorInfoBytes = 8 + 1 + 4 + 4 + 8;

/// Whether `text` is UTF-8 without control characters and not empty.
bool is_name(std::string_view text) {
  std::size_t i = 0;
  while (i < text.size()) {
    const auto lead = static_cast<unsigned char>(text[i]);
    if (lead < 0x20 || lead == 0x7f || (lead >= 0x80 && lead < 0xc2) || lead > 0xf4) return false;
    const std::size_t extra = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    if (text.size() - i <= extra) return false;
    for (std::size_t k = 1; k <= extra; ++k) {
      const auto next = static_cast<unsigned char>(text[i + k]);
      if ((next & 0xc0) != 0x80) return false;
      // Overlong forms, surrogates and values above U+10FFFF show in the second byte.
      if (k == 1 && ((lead == 0xe0 && next < 0xa0) || (lead == 0xed && next > 0x9f) ||
                     (lead == 0xf0 && next < 0x90) || (lead == 0xf4 && next > 0x8f))) {
        return false;
      }
    }
    i += extra + 1;
  }
  return !text.empty();
}

std::string read_name(Cursor& cursor, const std::string& field, std::uint64_t max_bytes) {
  const std::uint64_t start = cursor.position();
  const std::string_view name = cursor.read_string(field, max_bytes);
  if (!is_name(name)) {
    fail(cursor.path(), start, field, "a name in UTF-8 without control characters", quote(name));
  }
  return std::string(name);
}

std::uint32_t read_version(Cursor& cursor) {
  const std::string_view magic{reinterpret_cast<const char*>(cursor.take(4, "magic")), 4};
  if (magic != "GGUF") {
    fail(cursor.path(), 0, "magic", "'GGUF'", quote(magic),
         magic == "vers" ? "this looks like a Git LFS pointer; fetch the file itself"
                         : "not a GGUF file");
  }
  const auto version = cursor.read<std::uint32_t>("version");
  if (version != 0 && (version & 0xffffu) == 0) {
    fail(cursor.path(), 4, "version", "2 or 3, little-endian",
         std::to_string(__builtin_bswap32(version)) + ", big-endian",
         "big-endian files are not read; convert with gguf_convert_endian.py");
  }
  if (version != 2 && version != 3) {
    fail(cursor.path(), 4, "version", "2 or 3", std::to_string(version),
         version == 1 ? "GGUF version 1 was never in wide use; convert the model again" : "");
  }
  return version;
}

std::uint64_t read_count(Cursor& cursor, std::string_view field, std::uint64_t least_bytes) {
  const std::uint64_t start = cursor.position();
  const auto count = cursor.read<std::uint64_t>(field);
  const std::uint64_t most = cursor.remaining() / least_bytes;
  if (count > most) {
    fail(cursor.path(), start, field,
         "at most " + std::to_string(most) + " (what the rest of the file can hold)",
         std::to_string(count));
  }
  return count;
}

GgufType read_type(Cursor& cursor, const std::string& field) {
  const std::uint64_t start = cursor.position();
  const auto id = cursor.read<std::uint32_t>(field);
  if (id > static_cast<std::uint32_t>(GgufType::F64)) {
    fail(cursor.path(), start, field, "a value type from 0 to 12", std::to_string(id));
  }
  return static_cast<GgufType>(id);
}

/// Where an array's elements lie in the file; they become pointers when its bytes stop moving.
struct ArrayRange {
  std::size_t entry;
  std::uint64_t begin, size;
};

GgufArray read_array(Cursor& cursor, const std::string& key, ArrayRange& range) {
  GgufArray array;
  const std::uint64_t type_at = cursor.position();
  array.element = read_type(cursor, key + ": array element type");
  if (array.element == GgufType::Array) {
    fail(cursor.path(), type_at, key + ": array element type", "a scalar or string type",
         "a nested array");
  }
  const std::uint64_t element_bytes =
      array.element == GgufType::String ? sizeof(std::uint64_t) : scalar_bytes(array.element);
  const std::string count_field = key + ": array count";
  const std::uint64_t count_at = cursor.position();
  array.count = read_count(cursor, count_field, element_bytes);
  if (array.count > kMaxArrayElements) {
    fail(cursor.path(), count_at, count_field, "at most " + std::to_string(kMaxArrayElements),
         std::to_string(array.count));
  }
  range.begin = cursor.position();
  if (array.element == GgufType::String) {
    const std::string field = key + ": array string";
    for (std::uint64_t i = 0; i < array.count; ++i) cursor.read_string(field);
  } else {
    cursor.take(array.count * element_bytes, key);  // both factors are bounded, so no overflow
  }
  range.size = cursor.position() - range.begin;
  return array;
}

bool read_bool(Cursor& cursor, const std::string& key) {
  const std::uint64_t start = cursor.position();
  const auto byte = cursor.read<std::uint8_t>(key);
  if (byte > 1) fail(cursor.path(), start, key, "a bool, 0 or 1", std::to_string(byte));
  return byte == 1;
}

template <class T>
std::uint64_t unsigned_value(Cursor& cursor, const std::string& key) {
  return cursor.read<T>(key);
}
template <class T>
std::int64_t signed_value(Cursor& cursor, const std::string& key) {
  return cursor.read<T>(key);
}

GgufScalar read_scalar(Cursor& cursor, GgufType type, const std::string& key) {
  switch (type) {
    case GgufType::U8:
      return unsigned_value<std::uint8_t>(cursor, key);
    case GgufType::U16:
      return unsigned_value<std::uint16_t>(cursor, key);
    case GgufType::U32:
      return unsigned_value<std::uint32_t>(cursor, key);
    case GgufType::U64:
      return unsigned_value<std::uint64_t>(cursor, key);
    case GgufType::I8:
      return signed_value<std::int8_t>(cursor, key);
    case GgufType::I16:
      return signed_value<std::int16_t>(cursor, key);
    case GgufType::I32:
      return signed_value<std::int32_t>(cursor, key);
    case GgufType::I64:
      return signed_value<std::int64_t>(cursor, key);
    case GgufType::F32:
      return static_cast<double>(cursor.read<float>(key));
    case GgufType::F64:
      return cursor.read<double>(key);
    case GgufType::Bool:
      return read_bool(cursor, key);
    case GgufType::String:
      return std::string(cursor.read_string(key));
    case GgufType::Array:
      break;  // read by read_array
  }
  fail(cursor.path(), cursor.position(), key, "a scalar value", std::string(name_of(type)));
}

void read_entries(Cursor& cursor, std::uint64_t count, FileIndex& index,
                  std::vector<ArrayRange>& arrays, std::uint32_t& alignment) {
  std::unordered_set<std::string> seen;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t start = cursor.position();
    GgufEntry entry;
    entry.key = read_name(cursor, "key " + std::to_string(i), kMaxKeyBytes);
    const std::string key = quote(entry.key);
    if (!seen.insert(entry.key).second) {
      fail(cursor.path(), start, "key " + key, "unique keys", "the key a second time");
    }
    const std::uint64_t type_at = cursor.position();
    entry.type = read_type(cursor, key + ": value type");
    if (entry.type == GgufType::Array) {
      ArrayRange range{index.entries.size(), 0, 0};
      entry.value = read_array(cursor, key, range);
      arrays.push_back(range);
    } else {
      entry.value = read_scalar(cursor, entry.type, key);
    }
    if (entry.key == "general.alignment") {
      if (entry.type != GgufType::U32) {
        fail(cursor.path(), type_at, key, "type u32", std::string(name_of(entry.type)));
      }
      const std::uint64_t value = std::get<std::uint64_t>(entry.value);
      if (!std::has_single_bit(value)) {
        fail(cursor.path(), type_at + 4, key, "a power of two", std::to_string(value));
      }
      alignment = static_cast<std::uint32_t>(value);
    }
    index.entries.push_back(std::move(entry));
  }
}

/// A tensor info as stored: its offset counts from the start of the data section.
struct TensorInfo {
  GgufTensor tensor;
  std::uint64_t info_at = 0;
};

void read_dims(Cursor& cursor, const std::string& field, const QuantTraits& facts,
               std::uint64_t dims_at, const std::int64_t (&ne)[kMaxDims], GgufTensor& tensor) {
  // Zero-sized tensors are legal, but the other dimensions must still multiply without overflow.
  std::uint64_t nonzero = 1;
  bool empty = false;
  for (int i = 0; i < tensor.rank; ++i) {
    empty = empty || ne[i] == 0;
    if (ne[i] > 0 && (!checked_multiply(nonzero, static_cast<std::uint64_t>(ne[i]), nonzero) ||
                      nonzero > kMaxInt64)) {
      fail(cursor.path(), dims_at, field + ": dims", "fewer than 2^63 elements", "more");
    }
    tensor.shape[tensor.rank - 1 - i] = ne[i];
  }
  // How many bytes an unknown type takes shows where the next tensor begins.
  if (facts.type == QuantType::Unknown) return;
  const auto block_elems = static_cast<std::uint64_t>(facts.block_elems);
  const auto row = static_cast<std::uint64_t>(ne[0]);
  if (row % block_elems != 0) {
    fail(cursor.path(), dims_at, field + ": innermost dim",
         "a multiple of " + std::to_string(block_elems) + " (one block of " +
             std::string(facts.name) + ")",
         std::to_string(row));
  }
  std::uint64_t nbytes = 0;
  if (!empty && (!checked_multiply(nonzero / block_elems,
                                   static_cast<std::uint64_t>(facts.block_bytes), nbytes) ||
                 nbytes > kMaxInt64)) {
    fail(cursor.path(), dims_at, field + ": dims", "fewer than 2^63 bytes", "more");
  }
  tensor.nbytes = nbytes;
}

TensorInfo read_tensor_info(Cursor& cursor, std::uint64_t number) {
  TensorInfo info;
  info.info_at = cursor.position();
  GgufTensor& tensor = info.tensor;
  tensor.name = read_name(cursor, "name of tensor " + std::to_string(number), kMaxTensorNameBytes);
  const std::string field = "tensor " + quote(tensor.name);

  const std::uint64_t rank_at = cursor.position();
  const auto rank = cursor.read<std::uint32_t>(field + ": n_dims");
  if (rank > kMaxDims) {
    fail(cursor.path(), rank_at, field + ": n_dims", "at most " + std::to_string(kMaxDims),
         std::to_string(rank));
  }
  tensor.rank = static_cast<int>(rank);
  const std::uint64_t dims_at = cursor.position();
  std::int64_t ne[kMaxDims] = {1, 1, 1, 1};
  for (std::uint32_t i = 0; i < rank; ++i) {
    ne[i] = cursor.read<std::int64_t>(field + ": dims");
    if (ne[i] < 0) {
      fail(cursor.path(), dims_at + 8 * i, field + ": dim " + std::to_string(i), "at least 0",
           std::to_string(ne[i]));
    }
  }

  // One tensor of a type from elsewhere leaves all others readable.
  tensor.type_id = cursor.read<std::uint32_t>(field + ": type");
  tensor.quant = quant_type_from_id(tensor.type_id).value_or(QuantType::Unknown);
  read_dims(cursor, field, traits(tensor.quant), dims_at, ne, tensor);
  tensor.offset = cursor.read<std::uint64_t>(field + ": offset");
  return info;
}

/// Rounds `value` up to a multiple of `alignment`, a power of two; false on overflow.
bool align_up(std::uint64_t value, std::uint64_t alignment, std::uint64_t& out) {
  std::uint64_t sum = 0;
  if (!checked_add(value, alignment - 1, sum)) return false;
  out = sum & ~(alignment - 1);
  return true;
}

/// The bytes of a tensor of an unknown type, at `begin` in the data section: up to the next tensor,
/// or to the end of the data. Throws where they are no multiple of the alignment.
std::uint64_t unknown_bytes(const InputFile& file, const std::vector<TensorInfo>& infos,
                            std::size_t i, std::uint64_t begin, std::uint64_t alignment,
                            std::uint64_t data_bytes) {
  const bool last = i + 1 == infos.size();
  const std::uint64_t end = last ? data_bytes : infos[i + 1].tensor.offset;
  if (end < begin || end > data_bytes || (!last && end % alignment != 0)) {
    const TensorInfo& next = infos[last ? i : i + 1];
    fail(file.path(), next.info_at, "tensor " + quote(next.tensor.name) + ": offset",
         "a multiple of " + std::to_string(alignment) + " from " + std::to_string(begin) + " to " +
             std::to_string(data_bytes),
         std::to_string(end));
  }
  return end - begin;
}

/// Checks the tensors' ranges and makes their offsets absolute.
void locate_tensors(const InputFile& file, std::uint64_t infos_end, std::uint64_t alignment,
                    std::vector<TensorInfo>& infos) {
  std::uint64_t data_at = 0;
  if (!align_up(infos_end, alignment, data_at)) {
    fail(file.path(), infos_end, "data section", "a start below 2^64", "more");
  }
  const std::uint64_t data_bytes = file.size() > data_at ? file.size() - data_at : 0;
  std::uint64_t running = 0;
  for (std::size_t i = 0; i < infos.size(); ++i) {
    TensorInfo& info = infos[i];
    GgufTensor& tensor = info.tensor;
    const std::string field = "tensor " + quote(tensor.name);
    if (tensor.offset != running) {
      fail(file.path(), info.info_at, field + ": offset",
           std::to_string(running) + " (tensors follow each other, padded to " +
               std::to_string(alignment) + " bytes)",
           std::to_string(tensor.offset));
    }
    if (tensor.quant == QuantType::Unknown) {
      tensor.nbytes = unknown_bytes(file, infos, i, running, alignment, data_bytes);
    }
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    const bool inside = checked_add(data_at, running, begin) &&
                        checked_add(begin, tensor.nbytes, end) && end <= file.size();
    // A tensor without bytes may stand behind padding that was not written.
    if (!inside && tensor.nbytes > 0) {
      fail(file.path(), info.info_at, field + ": data",
           std::to_string(tensor.nbytes) + " bytes at byte " + std::to_string(begin),
           "a file of " + std::to_string(file.size()) + " bytes",
           "the file is truncated or damaged");
    }
    if (!checked_add(running, tensor.nbytes, running) || !align_up(running, alignment, running)) {
      fail(file.path(), info.info_at, field + ": end", "less than 2^64", "more");
    }
    tensor.offset = begin;
  }
}

}  // namespace

FileIndex read_index(const InputFile& file) {
  Cursor cursor(file);
  FileIndex index;
  index.version = read_version(cursor);
  const std::uint64_t tensor_count = read_count(cursor, "tensor count", kMinTensorInfoBytes);
  const std::uint64_t entry_count = read_count(cursor, "metadata count", kMinEntryBytes);

  std::vector<ArrayRange> arrays;
  std::uint32_t alignment = kDefaultAlignment;
  read_entries(cursor, entry_count, index, arrays, alignment);
  const std::uint64_t entries_end = cursor.position();

  std::vector<TensorInfo> infos;
  std::unordered_set<std::string> seen;
  for (std::uint64_t i = 0; i < tensor_count; ++i) {
    infos.push_back(read_tensor_info(cursor, i));
    const TensorInfo& info = infos.back();
    if (!seen.insert(info.tensor.name).second) {
      fail(file.path(), info.info_at, "tensor " + quote(info.tensor.name), "unique tensor names",
           "the name a second time");
    }
  }
  locate_tensors(file, cursor.position(), alignment, infos);
  index.tensors.reserve(infos.size());
  for (TensorInfo& info : infos) index.tensors.push_back(std::move(info.tensor));

  if (!arrays.empty()) index.metadata = cursor.release(entries_end);
  for (const ArrayRange& range : arrays) {
    std::get<GgufArray>(index.entries[range.entry].value).bytes = {
        index.metadata.get() + range.begin, static_cast<std::size_t>(range.size)};
  }
  return index;
}

}  // namespace moesaic::gguf
