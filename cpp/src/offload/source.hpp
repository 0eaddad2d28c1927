#pragma once

/// Experts in slow memory: where they lie mapped, or read from disk into a few staging buffers.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "moesaic/offload.hpp"
#include "offload/slots.hpp"

namespace moesaic::offload {

/// Some experts of one layer, readable while this lives.
class ExpertBatch {
 public:
  virtual ~ExpertBatch() = default;
  /// Waits until expert `i` of the batch is there. Errors: IoError, FormatError.
  virtual ExpertBytes wait(std::size_t i) = 0;
};

class ExpertSource {
 public:
  virtual ~ExpertSource() = default;
  /// Most experts of one batch.
  virtual std::int32_t batch_limit() const = 0;
  /// Asks for all of `experts` at once, at most batch_limit(). The caller holds no other batch of
  /// this source: with that, waiting for buffers cannot block for ever.
  virtual std::unique_ptr<ExpertBatch> open(std::int32_t layer,
                                            std::span<const std::int32_t> experts) = 0;
  /// These will be asked for soon, the likeliest first; may be ignored.
  virtual void expect(std::int32_t layer, std::span<const std::int32_t> experts) = 0;
  virtual std::int64_t nbytes() const { return 0; }  ///< of own memory
  virtual IoStats stats() const { return {}; }
};

/// The layers' own stacks.
std::unique_ptr<ExpertSource> make_mapped_source(const std::vector<LayerMoeWeights>& layers);

/// A piece of a file.
struct FileRange {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::int64_t bytes = 0;
};
/// Where each role of an expert lies; `bytes` 0 for a role that the layer lacks.
using ExpertRanges = std::array<FileRange, 3>;

/// Fills `out` from a file; called from several threads. Errors: IoError, FormatError.
using ReadFn =
    std::function<void(std::uint32_t file, std::uint64_t offset, std::span<std::byte> out)>;

struct DiskOptions {
  std::int32_t buffers = 16;  ///< experts in memory
  std::int32_t threads = 8;   ///< requests in flight
};
/// `ranges[layer][expert]`.
std::unique_ptr<ExpertSource> make_disk_source(std::vector<std::vector<ExpertRanges>> ranges,
                                               ReadFn read, const DiskOptions& options);

/// The ranges of every expert of `file`'s layers, whose stacks view its mapping, and a reader for
/// them. Touches no tensor. Errors: UnsupportedError for a file without a mapping.
std::vector<std::vector<ExpertRanges>> locate_experts(const GgufFile& file,
                                                      const std::vector<LayerMoeWeights>& layers);
ReadFn open_files(const GgufFile& file);

}  // namespace moesaic::offload
