#pragma once

/// Where experts come from: a mapped file or arrays, where they are used in place, or a file from
/// which they are read into a few staging buffers.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moesaic/offload.hpp"
#include "offload/slots.hpp"

namespace moesaic::gguf {
class InputFile;
}

namespace moesaic::offload {

/// Some experts of one layer, readable while this lives.
class ExpertBatch {
 public:
  virtual ~ExpertBatch() = default;
  /// Waits until expert `i` of the batch is there. Errors: IoError, FormatError.
  virtual ExpertBytes wait(std::size_t i) = 0;
  /// Whether wait(i) would return or throw at once.
  virtual bool ready(std::size_t i) = 0;
};

/// How sure it is that experts will be asked for.
enum class Expect : std::uint8_t {
  Needed,   ///< by the forward that says so, next
  Told,     ///< by the caller of the library, who may be wrong
  Guessed,  ///< by history; a source that finds too few of them used stops listening for a while
};

/// The experts of all layers of a store in slow memory.
class ExpertSource {
 public:
  virtual ~ExpertSource() = default;
  /// The most experts of one batch.
  virtual std::int32_t batch_limit() const = 0;
  /// Asks for all of `experts` at once, at most batch_limit() of them. The caller must hold no
  /// other batch of this source; otherwise callers could wait for each other's buffers for ever.
  virtual std::unique_ptr<ExpertBatch> open(std::int32_t layer,
                                            std::span<const std::int32_t> experts) = 0;
  /// Says that these will be asked for soon, the likeliest first. A source may ignore it.
  virtual void expect(std::int32_t layer, std::span<const std::int32_t> experts,
                      Expect how_sure) = 0;
  virtual std::int64_t nbytes() const { return 0; }  ///< bytes of its own buffers
  virtual IoStats stats() const { return {}; }
};

/// A source that gives the bytes of the layers' own stacks, where they are.
std::unique_ptr<ExpertSource> make_mapped_source(const std::vector<LayerMoeWeights>& layers);

/// A piece of a file.
struct FileRange {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::int64_t bytes = 0;
};
/// What is read of an expert, at most kMaxPieces. Without a decoder: its three roles, `bytes` 0 for
/// one that the layer lacks.
using ExpertRanges = std::vector<FileRange>;
/// Three tensors of each role.
inline constexpr std::size_t kMaxPieces = 9;
/// Where the pieces of an expert are in memory.
using PieceBytes = std::array<const std::byte*, kMaxPieces>;

/// Makes of what a file has of an expert what kernels read, for the layers of one form.
class ExpertDecoder {
 public:
  virtual ~ExpertDecoder() = default;
  /// What decode() writes at most.
  virtual std::int64_t nbytes() const = 0;
  /// Where the roles are afterwards: among the pieces, or in the nbytes() bytes at `to`, which is a
  /// multiple of 64. Called from several threads. Errors: FormatError.
  virtual ExpertBytes decode(std::int32_t expert, const PieceBytes& pieces,
                             std::byte* to) const = 0;
};
/// One decoder for each layer; empty where experts are used as they were read.
using Decoders = std::vector<std::shared_ptr<const ExpertDecoder>>;

/// Fills `out` from a file; called from several threads. Errors: IoError, FormatError.
using ReadFn =
    std::function<void(std::uint32_t file, std::uint64_t offset, std::span<std::byte> out)>;

struct DiskOptions {
  std::int32_t buffers = 16;  ///< experts in memory
  std::int32_t threads = 16;  ///< each keeps one request in flight
  /// Offsets, sizes and addresses of reads are multiples of this power of two; a read may then reach
  /// over the end of its file.
  std::int64_t alignment = 1;
};
/// Bytes of the largest expert as it is read, and decoded beside that.
std::int64_t largest_expert(const std::vector<std::vector<ExpertRanges>>& ranges,
                            const Decoders& decoders);
/// Bytes of the buffers of make_disk_source.
std::int64_t disk_buffer_bytes(const std::vector<std::vector<ExpertRanges>>& ranges,
                               const DiskOptions& options, const Decoders& decoders = {});
/// A source that reads from disk what `ranges[layer][expert]` names.
std::unique_ptr<ExpertSource> make_disk_source(std::vector<std::vector<ExpertRanges>> ranges,
                                               ReadFn read, const DiskOptions& options,
                                               Decoders decoders = {});

/// The ranges of every expert of `file`'s layers, whose stacks view its mapping, and a reader for
/// them. Touches no tensor. Errors: UnsupportedError for a file without a mapping.
std::vector<std::vector<ExpertRanges>> locate_experts(const GgufFile& file,
                                                      const std::vector<LayerMoeWeights>& layers);
/// How the files of a store are read.
struct Reader {
  ReadFn read;
  std::int64_t alignment = 1;  ///< as DiskOptions::alignment
  std::string way;             ///< in words: "O_DIRECT", or through what, and why
};
/// A reader of files that are open: what a path leads to may have changed since, and experts of one
/// file beside the router of another would give plausible numbers. `direct`: past the page cache
/// (true), through it (false), or past it where the file system can (unset). Errors:
/// UnsupportedError when `direct` is true and the file system cannot.
Reader reader_of(const std::vector<std::shared_ptr<const gguf::InputFile>>& files,
                 std::optional<bool> direct);

}  // namespace moesaic::offload
