#include "cpu/panel_cache.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <span>
#include <system_error>
#include <thread>

#include "cpu/kernels/panel_format.hpp"
#include "moesaic/interrupt.hpp"

namespace moesaic::cpu {
namespace {

/// Counts changes of the order of bytes in panels that kPanelFormats does not show, so that panels
/// which an older library kept are made anew.
constexpr int kPanelVersion = 1;

/// What the order of bytes in panels depends on; the same on every instruction set.
std::uint64_t layout_hash() {
  Hash hash;
  const auto add = [&](std::int64_t number) { hash.add(static_cast<std::uint64_t>(number)); };
  add(kPanelVersion);
  add(kRows);
  add(kRecordCols);
  for (const PanelFormat& format : kPanelFormats) {
    add(static_cast<std::int64_t>(format.type));
    add(format.block_elems);
    add(format.block_bytes);
    add(format.alternate ? 1 : 0);
    for (int f = 0; f < format.num_fields; ++f) {
      add(format.fields[f].offset);
      add(format.fields[f].bytes);
      add(format.fields[f].chunk);
    }
  }
  return hash.value();
}

/// A hash of a few of the bytes, read from the file: for one that was replaced by another of the same
/// size, names and time of change, as in images of containers, where all files have one time.
std::uint64_t sample_of(const RoleWeights& weights) {
  constexpr std::int64_t kSamples = 8;
  constexpr std::int64_t kBytes = 64;
  const WeightRef& ref = weights.ref;
  const std::int64_t rows = ref.num_experts * ref.rows;
  const std::int64_t count = std::min(kSamples, rows);
  std::array<std::byte, kBytes> buffer;
  const std::span bytes =
      std::span(buffer).first(static_cast<std::size_t>(std::min(kBytes, ref.row_stride)));
  Hash hash;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = rows * i / count;
    const auto expert = static_cast<std::int32_t>(row / ref.rows);
    weights.read(ref.expert(expert) + row % ref.rows * ref.row_stride, bytes);
    hash.add(std::span<const std::byte>(bytes));
  }
  return hash.value();
}

}  // namespace

CacheEntry panel_entry(const RoleWeights& rows, const WeightRef& panels,
                       const std::filesystem::path& folder) {
  require<UnsupportedError>(rows.origin != nullptr, [] {
    return Problem{.operation = "load",
                   .what = "weight_cache",
                   .expected = "weights of a mapped GGUF file or a checkpoint, as they are there",
                   .got = "others",
                   .hint = {}};
  });
  const WeightOrigin& origin = *rows.origin;
  const std::string type(traits(panels.type).name);
  // Other selections of a tensor's rows or experts have files of their own.
  CacheEntry entry{
      .folder = folder,
      .name = file_name_of(origin.tensor) + "-" + hex_of(origin.selection) + ".panels",
      .facts = {{"layout", hex_of(layout_hash())},
                {"source file", hex_of(origin.file)},
                {"tensor", file_name_of(origin.tensor) + " " + hex_of(origin.selection)},
                {"shape", type + " [" + std::to_string(panels.num_experts) + ", " +
                              std::to_string(panels.rows) + ", " + std::to_string(panels.cols) +
                              "]"}},
      .bytes = panels.num_experts * panels.expert_stride};
  // Where rows are made of other bytes, `origin.file` has a sample of those.
  if (rows.read) entry.facts.emplace_back("sample of its bytes", hex_of(sample_of(rows)));
  return entry;
}

CachedPanels find_panels(const CacheEntry& entry, const std::function<void()>& waiting) {
  constexpr auto kPause = std::chrono::milliseconds(20);
  CachedPanels found;
  found.panels = map_entry(entry, found.why);
  if (found.panels != nullptr) return found;
  std::error_code error;
  std::filesystem::create_directories(entry.folder, error);
  if (error) throw IoError(error.value(), entry.folder.string(), "weight cache: create");
  while (true) {
    found.to_write = FolderLock::take(entry.folder);
    // Whoever had the lock may have written it meanwhile.
    found.panels = map_entry(entry, found.why);
    if (found.panels != nullptr) found.to_write = nullptr;
    if (found.panels != nullptr || found.to_write != nullptr) return found;
    Interrupt::check();
    waiting();
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace moesaic::cpu
