#pragma once

/// Panels that are kept in files from one start to the next (LoadOptions::weight_cache).

#include <cstddef>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "base/cache_file.hpp"
#include "moesaic/expert_stack.hpp"

namespace moesaic::cpu {

/// The file for the panels of `rows`, expert after expert, that lie as `panels` says. Throws
/// UnsupportedError for weights without an origin.
CacheEntry panel_entry(const RoleWeights& rows, const WeightRef& panels,
                       const std::filesystem::path& folder);

/// What a load found.
struct CachedPanels {
  std::shared_ptr<const std::byte> panels;     ///< mapped; null where no good file had them
  std::unique_ptr<const FolderLock> to_write;  ///< then: the right to write them
  std::string why;                             ///< then: what was there instead
};

/// Looks for an entry. While another process writes to the folder it waits, calls `waiting` every
/// now and then, and takes what that one writes. Throws IoError where the folder cannot be made or
/// opened.
CachedPanels find_panels(const CacheEntry& entry, const std::function<void()>& waiting);

}  // namespace moesaic::cpu
