#pragma once

/// Models in several files: names like `name-00001-of-00003.gguf`, and the split.* keys. The names
/// of the other shards are made from the given path alone, never from what a file says, so that no
/// file leads out of its directory.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "moesaic/gguf.hpp"

namespace moesaic::gguf {

struct SplitInfo {
  std::int64_t index = 0;  ///< from 0
  std::int64_t count = 1;
  std::optional<std::int64_t> tensors;  ///< number of tensors in all shards
};

/// Reads the split.* keys of one file of `tensors` tensors; a file that is not split is number 0 of
/// 1. So is one that holds all tensors that the keys count and is not named as a shard: somebody
/// merged the shards and left the keys. Throws FormatError.
SplitInfo read_split(const std::filesystem::path& path, std::span<const GgufEntry> entries,
                     std::size_t tensors);

/// The paths of all shards beside `path`, which must be named as shard `split.index` of
/// `split.count`. Throws FormatError.
std::vector<std::filesystem::path> shard_paths(const std::filesystem::path& path,
                                               const SplitInfo& split);

}  // namespace moesaic::gguf
