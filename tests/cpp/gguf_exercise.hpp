#pragma once

/// Uses everything an open GgufFile offers, for tests that feed it damaged files: reads every
/// tensor byte, decodes every array, asks every lookup, and checks what must hold of any accepted
/// file.

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::test {

/// Runs `call`; a FormatError is an answer too.
template <class Call>
void allow_format_error(Call&& call) {
  try {
    call();
  } catch (const FormatError&) {
  }
}

/// Throws std::logic_error when the file's answers contradict each other. Returns a checksum, so
/// that no read is optimised away.
inline std::uint64_t exercise(const GgufFile& file) {
  const auto must = [](bool ok, const char* what) {
    if (!ok) throw std::logic_error(what);
  };
  std::uint64_t sum = 0;
  for (const GgufEntry& entry : file.metadata()) {
    must(file.find(entry.key) == &entry, "find() returns another entry");
    allow_format_error([&] { sum += static_cast<std::uint64_t>(*file.integer(entry.key)); });
    allow_format_error([&] { sum += *file.number(entry.key) > 0 ? 1 : 0; });
    allow_format_error([&] { sum += *file.boolean(entry.key) ? 1 : 0; });
    allow_format_error([&] { sum += file.string(entry.key)->size(); });
    for (const std::int32_t layer : {-1, 0, 1, 1 << 30}) {
      allow_format_error([&] { sum += file.integer_for_layer(entry.key, layer).has_value(); });
      allow_format_error([&] { sum += file.number_for_layer(entry.key, layer).has_value(); });
    }
    if (const auto* array = std::get_if<GgufArray>(&entry.value)) {
      const auto count = [&](const auto& values) {
        must(values.size() == array->count, "an array decodes to another count");
        sum += values.size();
      };
      allow_format_error([&] { count(array->as_integers()); });
      allow_format_error([&] { count(array->as_numbers()); });
      allow_format_error([&] { count(array->as_strings()); });
    }
  }
  for (const GgufTensor& tensor : file.tensors()) {
    must(file.tensor(tensor.name) == &tensor, "tensor() returns another tensor");
    const QuantTraits& facts = traits(tensor.quant);
    std::uint64_t elems = 1;
    for (const std::int64_t dim : tensor.shape) {
      must(dim >= 0, "a negative dimension");
      elems *= static_cast<std::uint64_t>(dim);
    }
    const auto block_elems = static_cast<std::uint64_t>(facts.block_elems);
    const auto block_bytes = static_cast<std::uint64_t>(facts.block_bytes);
    if (tensor.quant == QuantType::Unknown) {
      must(tensor.offset <= file.file_bytes() && tensor.nbytes <= file.file_bytes(),
           "a tensor of an unknown type reaches beyond the file");
      try {
        sum += file.bytes(tensor).bytes.size();
        must(false, "a tensor of an unknown type can be read");
      } catch (const UnsupportedError&) {
      }
      continue;
    }
    must(elems / block_elems * block_bytes == tensor.nbytes, "the shape disagrees with the bytes");
    const GgufBytes bytes = file.bytes(tensor);
    must(bytes.bytes.size() == tensor.nbytes, "a tensor has another number of bytes");
    for (const std::byte byte : bytes.bytes) sum = sum * 31 + static_cast<std::uint64_t>(byte);
  }
  std::int32_t before = -1;
  for (const std::int32_t layer : file.moe_layers()) {
    must(layer > before, "layers are not ascending");
    before = layer;
    allow_format_error([&] { sum += find_moe_tensors(file, layer).has_experts(); });
  }
  return sum;
}

}  // namespace moesaic::test
