#pragma once

/// Reads the head of one GGUF file, checks it and turns it into an index.

#include <cstdint>
#include <vector>

#include "gguf/cursor.hpp"
#include "gguf/mapped_file.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::gguf {

struct FileIndex {
  std::uint32_t version = 0;
  HeadBytes metadata;  ///< what the arrays in `entries` point into
  std::vector<GgufEntry> entries;
  std::vector<GgufTensor> tensors;
};

/// Reads versions 2 and 3, little-endian. Tensors must lie in the order of their infos, without
/// gaps other than the padding to `general.alignment`, as ggml asks; so their ranges cannot
/// overlap. Throws IoError and FormatError.
FileIndex read_index(const InputFile& file);

}  // namespace moesaic::gguf
