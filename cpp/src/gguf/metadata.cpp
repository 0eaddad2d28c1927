#include "gguf/metadata.hpp"

#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "gguf/cursor.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace gguf {

std::uint64_t scalar_bytes(GgufType type) {
  switch (type) {
    case GgufType::U8:
    case GgufType::I8:
    case GgufType::Bool:
      return 1;
    case GgufType::U16:
    case GgufType::I16:
      return 2;
    case GgufType::U32:
    case GgufType::I32:
    case GgufType::F32:
      return 4;
    case GgufType::U64:
    case GgufType::I64:
    case GgufType::F64:
      return 8;
    case GgufType::String:
    case GgufType::Array:
      return 0;
  }
  return 0;
}

}  // namespace gguf

namespace {

[[noreturn]] void fail_value(std::string what, std::string expected, std::string got) {
  throw FormatError(Problem{"GgufFile", std::move(what), std::move(expected), std::move(got), {}});
}

std::string describe(const GgufEntry& entry) {
  const auto* array = std::get_if<GgufArray>(&entry.value);
  if (array == nullptr) return std::string(name_of(entry.type));
  return "array of " + std::to_string(array->count) + " " + std::string(name_of(array->element));
}

[[noreturn]] void fail_type(const GgufEntry& entry, std::string expected) {
  fail_value("key " + gguf::quote(entry.key), std::move(expected), describe(entry));
}

std::int64_t to_signed(std::uint64_t value, const std::string& what) {
  if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    fail_value(what, "an integer below 2^63", std::to_string(value));
  }
  return static_cast<std::int64_t>(value);
}

template <class T>
T element_at(const GgufArray& array, std::uint64_t i) {
  T value;
  std::memcpy(&value, array.bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

/// Checks that an array's bytes agree with its count; callers have checked indices against the
/// count.
void require_elements(const GgufArray& array) {
  const std::uint64_t size = gguf::scalar_bytes(array.element);
  if (size == 0 || array.bytes.size() / size < array.count) {
    fail_value(
        "array", std::to_string(array.count) + " numbers",
        std::to_string(array.bytes.size()) + " bytes of " + std::string(name_of(array.element)));
  }
}

std::int64_t integer_at(const GgufArray& array, std::uint64_t i, const std::string& what) {
  switch (array.element) {
    case GgufType::U8:
      return element_at<std::uint8_t>(array, i);
    case GgufType::I8:
      return element_at<std::int8_t>(array, i);
    case GgufType::U16:
      return element_at<std::uint16_t>(array, i);
    case GgufType::I16:
      return element_at<std::int16_t>(array, i);
    case GgufType::U32:
      return element_at<std::uint32_t>(array, i);
    case GgufType::I32:
      return element_at<std::int32_t>(array, i);
    case GgufType::U64:
      return to_signed(element_at<std::uint64_t>(array, i), what);
    case GgufType::I64:
      return element_at<std::int64_t>(array, i);
    case GgufType::Bool: {
      const auto byte = element_at<std::uint8_t>(array, i);
      if (byte > 1) fail_value(what, "bools, 0 or 1", std::to_string(byte));
      return byte;
    }
    default:
      fail_value(what, "integers or bools", std::string(name_of(array.element)));
  }
}

double number_at(const GgufArray& array, std::uint64_t i, const std::string& what) {
  switch (array.element) {
    case GgufType::F32:
      return element_at<float>(array, i);
    case GgufType::F64:
      return element_at<double>(array, i);
    case GgufType::U64:
      return static_cast<double>(element_at<std::uint64_t>(array, i));
    case GgufType::Bool:
    case GgufType::String:
    case GgufType::Array:
      fail_value(what, "numbers", std::string(name_of(array.element)));
    default:
      return static_cast<double>(integer_at(array, i, what));
  }
}

/// The array of a key with one value per layer; null for a block that it does not reach, because it
/// is as long as the trunk and the block is behind it.
const GgufArray* layer_array(const GgufFile& file, const GgufEntry& entry, std::int32_t layer) {
  const auto& array = std::get<GgufArray>(entry.value);
  if (gguf::scalar_bytes(array.element) == 0) fail_type(entry, "a number, or one per layer");
  require_elements(array);
  if (layer >= 0 && static_cast<std::uint64_t>(layer) < array.count) return &array;
  const std::string architecture = file.string("general.architecture").value_or("") + ".";
  const auto count = [&](const char* key) { return file.integer(architecture + key).value_or(0); };
  const std::int64_t blocks = count("block_count");
  const std::int64_t behind = count("nextn_predict_layers");
  const std::int64_t trunk = behind >= 0 && behind < blocks ? blocks - behind : 0;
  if (layer < 0 || layer >= blocks || trunk < 1 || !std::cmp_equal(array.count, trunk)) {
    fail_type(entry, "a value for layer " + std::to_string(layer));
  }
  return nullptr;
}

double number_of(const GgufEntry& entry) {
  if (const auto* value = std::get_if<double>(&entry.value)) return *value;
  if (const auto* value = std::get_if<std::uint64_t>(&entry.value)) {
    return static_cast<double>(*value);
  }
  if (const auto* value = std::get_if<std::int64_t>(&entry.value)) {
    return static_cast<double>(*value);
  }
  fail_type(entry, "a number");
}

}  // namespace

namespace gguf {

const GgufEntry* find_entry(std::span<const GgufEntry> entries, std::string_view key) {
  for (const GgufEntry& entry : entries) {
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

std::int64_t integer_of(const GgufEntry& entry) {
  if (const auto* value = std::get_if<std::int64_t>(&entry.value)) return *value;
  if (const auto* value = std::get_if<std::uint64_t>(&entry.value)) {
    return to_signed(*value, "key " + quote(entry.key));
  }
  fail_type(entry, "an integer");
}

}  // namespace gguf

std::vector<std::int64_t> GgufArray::as_integers() const {
  if (element == GgufType::F32 || element == GgufType::F64) {
    fail_value("array", "integers or bools", std::string(name_of(element)));
  }
  require_elements(*this);
  std::vector<std::int64_t> out(static_cast<std::size_t>(count));
  for (std::uint64_t i = 0; i < count; ++i) out[i] = integer_at(*this, i, "array");
  return out;
}

std::vector<double> GgufArray::as_numbers() const {
  if (element == GgufType::Bool) fail_value("array", "numbers", "bool");
  require_elements(*this);
  std::vector<double> out(static_cast<std::size_t>(count));
  for (std::uint64_t i = 0; i < count; ++i) out[i] = number_at(*this, i, "array");
  return out;
}

std::vector<std::string> GgufArray::as_strings() const {
  if (element != GgufType::String) {
    fail_value("array", "strings", std::string(name_of(element)));
  }
  std::span<const std::byte> rest = bytes;
  const auto require_bytes = [&](std::uint64_t size) {
    if (size > rest.size()) {
      fail_value("array", std::to_string(count) + " strings",
                 std::to_string(bytes.size()) + " bytes");
    }
  };
  require_bytes(0);
  std::vector<std::string> out;
  if (count <= rest.size() / sizeof(std::uint64_t)) out.reserve(static_cast<std::size_t>(count));
  for (std::uint64_t i = 0; i < count; ++i) {
    std::uint64_t length = 0;
    require_bytes(sizeof(length));
    std::memcpy(&length, rest.data(), sizeof(length));
    rest = rest.subspan(sizeof(length));
    require_bytes(length);
    out.emplace_back(reinterpret_cast<const char*>(rest.data()), static_cast<std::size_t>(length));
    rest = rest.subspan(static_cast<std::size_t>(length));
  }
  return out;
}

std::optional<std::int64_t> GgufFile::integer(std::string_view key) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return std::nullopt;
  return gguf::integer_of(*entry);
}

std::optional<double> GgufFile::number(std::string_view key) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return std::nullopt;
  return number_of(*entry);
}

std::optional<bool> GgufFile::boolean(std::string_view key) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return std::nullopt;
  if (const auto* value = std::get_if<bool>(&entry->value)) return *value;
  fail_type(*entry, "a bool");
}

std::optional<std::string> GgufFile::string(std::string_view key) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return std::nullopt;
  if (const auto* value = std::get_if<std::string>(&entry->value)) return *value;
  fail_type(*entry, "a string");
}

std::optional<std::int64_t> GgufFile::integer_for_layer(std::string_view key,
                                                        std::int32_t layer) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return std::nullopt;
  if (entry->type != GgufType::Array) return gguf::integer_of(*entry);
  const GgufArray* const array = layer_array(*this, *entry, layer);
  if (array == nullptr) return std::nullopt;
  return integer_at(*array, static_cast<std::uint64_t>(layer), "key " + gguf::quote(key));
}

std::optional<double> GgufFile::number_for_layer(std::string_view key, std::int32_t layer) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return std::nullopt;
  if (entry->type != GgufType::Array) return number_of(*entry);
  const GgufArray* const array = layer_array(*this, *entry, layer);
  if (array == nullptr) return std::nullopt;
  return number_at(*array, static_cast<std::uint64_t>(layer), "key " + gguf::quote(key));
}

}  // namespace moesaic
