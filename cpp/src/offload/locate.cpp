// Finds which bytes of which file hold each expert of a mapped GGUF file.

#include <string>

#include "gguf/mapped_file.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"
#include "offload/source.hpp"

namespace moesaic::offload {
namespace {

/// The tensors of one block that can hold its experts.
std::vector<const GgufTensor*> expert_tensors(const GgufFile& file, std::int32_t layer) {
  const MoeTensors found = find_moe_tensors(file, layer);
  std::vector<const GgufTensor*> list = {found.gate, found.up, found.gate_up, found.down};
  for (const auto* experts : {&found.expert_gate, &found.expert_up, &found.expert_down}) {
    list.insert(list.end(), experts->begin(), experts->end());
  }
  std::erase(list, nullptr);
  return list;
}

/// Where the `bytes` mapped bytes from `at` on lie on disk.
FileRange range_of(const GgufFile& file, const std::vector<const GgufTensor*>& tensors,
                   const std::byte* at, std::int64_t bytes) {
  for (const GgufTensor* tensor : tensors) {
    const std::span<const std::byte> mapped = file.bytes(*tensor).bytes;
    if (at < mapped.data() || at + bytes > mapped.data() + mapped.size()) continue;
    return {tensor->shard, tensor->offset + static_cast<std::uint64_t>(at - mapped.data()), bytes};
  }
  throw FormatError(Problem{.operation = "MoeExpertStore",
                            .what = file.path().string(),
                            .expected = "experts inside their tensors",
                            .got = "some outside",
                            .hint = {}});
}

}  // namespace

std::vector<std::vector<ExpertRanges>> locate_experts(const GgufFile& file,
                                                      const std::vector<LayerMoeWeights>& layers) {
  require<UnsupportedError>(file.mapped(), [&] {
    return Problem{.operation = "MoeExpertStore",
                   .what = "memory_limit",
                   .expected = "a file opened with mmap=True",
                   .got = "mmap=False, which reads whole tensors",
                   .hint = "a mapping takes addresses, no memory"};
  });
  std::vector<std::vector<ExpertRanges>> all;
  for (const LayerMoeWeights& layer : layers) {
    const std::vector<const GgufTensor*> tensors = expert_tensors(file, layer.layer_index);
    std::vector<ExpertRanges>& experts = all.emplace_back();
    for (std::int32_t e = 0; e < layer.stack->num_experts(); ++e) {
      ExpertRanges& ranges = experts.emplace_back(std::size(kRoles));
      for (const Role role : kRoles) {
        const WeightRef& ref = layer.stack->role(role).ref;
        if (!ref) continue;
        ranges[static_cast<std::size_t>(role)] =
            range_of(file, tensors, ref.expert(e), ref.expert_bytes());
      }
    }
  }
  return all;
}

Reader reader_of(const std::vector<std::shared_ptr<const gguf::InputFile>>& files,
                 std::optional<bool> direct) {
  std::string why = "asked for";
  if (direct.value_or(true)) {
    std::vector<std::shared_ptr<const gguf::DirectFile>> direct_files;
    for (const auto& one : files) {
      direct_files.push_back(gguf::DirectFile::open(one, why));
      if (direct_files.back() == nullptr) break;
    }
    if (direct_files.empty() || direct_files.back() != nullptr) {
      return {[direct_files](std::uint32_t index, std::uint64_t offset, std::span<std::byte> out) {
                direct_files[index]->read(offset, out);
              },
              gguf::DirectFile::kAlignment, "O_DIRECT"};
    }
    require<UnsupportedError>(!direct.has_value(), [&] {
      return Problem{.operation = "MoeExpertStore",
                     .what = "direct_io",
                     .expected = "a file system that reads past the page cache",
                     .got = why,
                     .hint = "leave direct_io unset to read through the page cache there"};
    });
  }
  return {[files](std::uint32_t index, std::uint64_t offset, std::span<std::byte> out) {
            files[index]->read(offset, out);
          },
          1, "page cache (" + why + ")"};
}

}  // namespace moesaic::offload
