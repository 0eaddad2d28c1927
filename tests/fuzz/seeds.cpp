/// Writes the inputs that the fuzz targets of GGUF files start from: seeds FOLDER makes FOLDER/gguf
/// and FOLDER/layer. They follow from the lists of architectures and element types, so that a new
/// row of either is fuzzed without a file in the repository.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#include "gguf_fixture.hpp"
#include "layer_file.hpp"
#include "memory_file.hpp"
#include "model/presets.hpp"
#include "moesaic/quant.hpp"

namespace {

using namespace moesaic;
using namespace moesaic::test;

void write(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

/// A file without the bytes of its tensors.
std::string head(const std::string& bytes) {
  const fuzz::MemoryFile memory;
  memory.append(std::as_bytes(std::span(bytes)));
  std::uint64_t end = bytes.size();
  const auto file = GgufFile::open(memory.path(), {});
  for (const GgufTensor& tensor : file->tensors()) end = std::min(end, tensor.offset);
  return bytes.substr(0, end);
}

/// A layer whose experts are of one type, at the smallest sizes that every block divides.
std::string layer_of(QuantType type) {
  const std::int64_t size = std::max<std::int64_t>(traits(type).block_elems, 32);
  GgufWriter file;
  file.string("general.architecture", "qwen3moe");
  const auto key = [&](const char* name, std::int64_t value) {
    file.u32(std::string("qwen3moe.") + name, static_cast<std::uint32_t>(value));
  };
  key("block_count", 1);
  key("embedding_length", size);
  key("expert_count", 2);
  key("expert_used_count", 1);
  key("expert_feed_forward_length", size);
  file.filled("blk.0.ffn_gate_inp.weight", QuantType::F32, {2, size});
  for (const char* role : {"gate", "up", "down"}) {
    file.filled(std::string("blk.0.ffn_") + role + "_exps.weight", type, {2, size, size});
  }
  return file.bytes();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  const std::filesystem::path gguf = std::filesystem::path(argv[1]) / "gguf",
                              layer = std::filesystem::path(argv[1]) / "layer";
  std::filesystem::create_directories(gguf);
  std::filesystem::create_directories(layer);
  write(gguf / "everything", full_file().bytes());
  for (const Preset& preset : presets()) {
    const std::string bytes = head(file_of(preset).writer.bytes());
    write(layer / preset.architecture, bytes);
    write(gguf / preset.architecture, bytes);
  }
  for (const QuantTraits& type : quant_table()) {
    if (type.dequantize != nullptr && is_ggml_type(type.type))
      write(layer / type.name, head(layer_of(type.type)));
  }
  return 0;
}
