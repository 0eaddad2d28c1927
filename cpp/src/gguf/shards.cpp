#include "gguf/shards.hpp"

#include <cinttypes>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>

#include "gguf/metadata.hpp"
#include "moesaic/error.hpp"

namespace moesaic::gguf {
namespace {

constexpr std::int64_t kMaxShards = 65535;  // split.count is a u16

/// How the name of a shard ends, e.g. "-00001-of-00003.gguf".
std::string shard_suffix(std::int64_t index, std::int64_t count) {
  char text[64];
  std::snprintf(text, sizeof(text), "-%05" PRId64 "-of-%05" PRId64 ".gguf", index + 1, count);
  return text;
}

std::optional<std::int64_t> optional_integer(std::span<const GgufEntry> entries,
                                             std::string_view key) {
  const GgufEntry* entry = find_entry(entries, key);
  if (entry == nullptr) return std::nullopt;
  return integer_of(*entry);
}

}  // namespace

SplitInfo read_split(const std::filesystem::path& path, std::span<const GgufEntry> entries,
                     std::size_t tensors) {
  SplitInfo split;
  split.count = optional_integer(entries, "split.count").value_or(1);
  if (split.count == 0) split.count = 1;  // some writers say 0 for a file that is not split
  require<FormatError>(split.count >= 1 && split.count <= kMaxShards, [&] {
    return Problem{"GgufFile",
                   path.string() + ": split.count",
                   "1 to " + std::to_string(kMaxShards),
                   std::to_string(split.count),
                   {}};
  });
  if (split.count == 1) return split;
  const auto index = optional_integer(entries, "split.no");
  require<FormatError>(index && *index >= 0 && *index < split.count, [&] {
    return Problem{"GgufFile",
                   path.string() + ": split.no",
                   "0 to " + std::to_string(split.count - 1),
                   index ? std::to_string(*index) : "no such key",
                   {}};
  });
  split.index = *index;
  split.tensors = optional_integer(entries, "split.tensors.count");
  const bool whole = split.tensors && std::cmp_equal(*split.tensors, tensors);
  if (whole && !path.filename().string().ends_with(shard_suffix(split.index, split.count))) {
    return {};
  }
  return split;
}

std::vector<std::filesystem::path> shard_paths(const std::filesystem::path& path,
                                               const SplitInfo& split) {
  const std::string name = path.filename().string();
  const std::string own = shard_suffix(split.index, split.count);
  require<FormatError>(name.ends_with(own), [&] {
    return Problem{"GgufFile", path.string(), "a name that ends in " + own,
                   "another name, though split.no is " + std::to_string(split.index) +
                       " and split.count " + std::to_string(split.count),
                   "keep the shards' names, side by side in one directory; a file that is whole "
                   "lost its shards' names but not their split.* keys, which gguf-new-metadata "
                   "--remove-metadata takes away"};
  });
  const std::string prefix = name.substr(0, name.size() - own.size());
  std::vector<std::filesystem::path> paths;
  for (std::int64_t i = 0; i < split.count; ++i) {
    paths.push_back(path.parent_path() / (prefix + shard_suffix(i, split.count)));
  }
  return paths;
}

}  // namespace moesaic::gguf
