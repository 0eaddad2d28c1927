#pragma once

/// A GGUF file (or its shards) as an index over mapped bytes. Nothing is decoded that is not asked
/// for: arrays in the metadata stay as stored. The metadata is read into memory at opening, so that
/// what was checked cannot change; tensors are mapped.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "moesaic/names.hpp"
#include "moesaic/quant.hpp"

namespace moesaic {

namespace gguf {
class InputFile;
}

/// Types of metadata values. The enumerators count as their ids in the file do.
enum class GgufType : std::uint8_t {
  // clang-format off
  U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
  // clang-format on
};

/// An array left as stored; it lives as long as its GgufFile, closed or not. A string is found by
/// walking over those before it, so read strings all at once.
struct GgufArray {
  GgufType element = GgufType::U8;
  std::uint64_t count = 0;
  std::span<const std::byte> bytes;  ///< the elements as stored; validated, strings included
  std::vector<std::int64_t> as_integers() const;  ///< throws FormatError unless integers or bools
  std::vector<double> as_numbers() const;         ///< throws FormatError unless integers or floats
  std::vector<std::string> as_strings() const;    ///< throws FormatError unless strings
};

using GgufScalar = std::variant<bool, std::int64_t, std::uint64_t, double, std::string, GgufArray>;

struct GgufEntry {
  std::string key;
  GgufType type;
  GgufScalar value;
};

struct GgufTensor {
  std::string name;
  QuantType quant;            ///< Unknown for a type that this library does not know
  std::uint32_t type_id = 0;  ///< the type as the file has it
  int rank = 0;
  /// Row-major dimensions, outermost first (the reverse of ggml's ne): [E, rows, cols] for experts.
  std::int64_t shape[4] = {1, 1, 1, 1};
  std::uint64_t offset = 0;  ///< byte in its shard
  /// For an unknown type: what lies between the tensor and the next one, padding included.
  std::uint64_t nbytes = 0;
  std::uint32_t shard = 0;

  /// Dimension `i` as ggml counts them, from the innermost; those that a file leaves out are ones.
  std::int64_t ne(int i) const { return i < rank ? shape[rank - 1 - i] : 1; }
  /// Whether the dimensions are these, outermost first. As in ggml, outer ones do not count.
  bool has_shape(std::initializer_list<std::int64_t> dims) const;
  /// "[5, 32, 64]", the dimensions as the file has them.
  std::string shape_text() const;
};

/// Bytes of a tensor with the owner that keeps them alive.
struct GgufBytes {
  std::shared_ptr<const void> owner;
  std::span<const std::byte> bytes;
};

class GgufFile {
 public:
  struct Options {
    /// True: tensors are views of the mapping. Touching them after another process has truncated
    /// the file is fatal (SIGBUS); replacing it by rename is safe. False: bytes() reads with pread
    /// into memory of its own, and a file truncated later is a FormatError.
    bool mmap = true;
  };

  /// Opens one file, or all shards when given any `name-00001-of-0000N.gguf`. Errors: IoError,
  /// FormatError with the byte offset and the field. Every count is bounded by the remaining bytes
  /// before memory is taken for it. As in ggml, tensors must follow each other without gaps other
  /// than padding, in the order of their infos.
  static std::shared_ptr<GgufFile> open(const std::filesystem::path& path, Options options);
  static std::shared_ptr<GgufFile> open(const std::filesystem::path& path);
  ~GgufFile();

  const std::filesystem::path& path() const;
  std::span<const std::filesystem::path> shard_paths() const;
  std::uint32_t version() const;
  std::uint64_t file_bytes() const;  ///< bytes of all shards
  bool mapped() const;               ///< Options::mmap of open()
  /// Tells the file from others, also from what was written to its path later: a hash of the sizes
  /// and times of change of its shards and of the tensor infos, as they were at opening.
  std::uint64_t fingerprint() const;
  /// The folder within `parent` for repacked weights of this file (LoadOptions::weight_cache); an
  /// empty `parent` is the folder of the file. It bears the name of the file, or of the first shard.
  std::filesystem::path weight_cache(const std::filesystem::path& parent = {}) const;

  std::span<const GgufEntry> metadata() const;
  const GgufEntry* find(std::string_view key) const;
  /// Typed lookups; empty when the key is absent, FormatError when it has another type.
  std::optional<std::int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::string> string(std::string_view key) const;
  /// The key's scalar, or element `layer` of its array with one value per layer. An array may be
  /// as long as the trunk: behind it, for blocks that predict further tokens
  /// (`nextn_predict_layers`), it says nothing.
  std::optional<std::int64_t> integer_for_layer(std::string_view key, std::int32_t layer) const;
  std::optional<double> number_for_layer(std::string_view key, std::int32_t layer) const;

  std::span<const GgufTensor> tensors() const;
  const GgufTensor* tensor(std::string_view name) const;
  /// The tensor's bytes: the mapping itself, or a fresh read. Throws DeviceError after close(),
  /// UnsupportedError for a tensor of an unknown type.
  GgufBytes bytes(const GgufTensor& tensor) const;
  /// `size` of them from byte `begin` on; a file opened without mmap is read no further than that.
  GgufBytes bytes(const GgufTensor& tensor, std::uint64_t begin, std::uint64_t size) const;
  /// A copy, read from the file even where that is mapped: for bytes that are looked at once, since
  /// a mapping whose file was cut short ends the program with SIGBUS. Throws what bytes() throws,
  /// IoError, and FormatError for a file that was cut short.
  GgufBytes read(const GgufTensor& tensor) const;
  /// Copies bytes from where they are mapped, by reading the file; empty without a mapping.
  ReadBytes reader() const;

  /// Blocks that hold expert tensors (stacked, fused or one per expert), ascending.
  std::vector<std::int32_t> moe_layers() const;

  /// Unmaps the file. Throws DeviceError while mapped tensors of this file are still held elsewhere
  /// (buffers of read mode are their holders' own). Idempotent. Metadata and tensor infos stay
  /// readable.
  void close();
  bool closed() const;

  /// The shards as they were opened, whatever their paths lead to by now; empty after close().
  std::vector<std::shared_ptr<const gguf::InputFile>> input_files() const;

 private:
  GgufFile();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The expert tensors of one block; null where absent. Shapes are as named but not checked here.
struct MoeTensors {
  const GgufTensor* router = nullptr;          ///< ffn_gate_inp.weight [E, H]
  const GgufTensor* router_bias = nullptr;     ///< ffn_gate_inp.bias [E]
  const GgufTensor* selection_bias = nullptr;  ///< exp_probs_b(.bias) [E]
  const GgufTensor* router_scale = nullptr;    ///< ffn_gate_inp.scale [H], of the router's input
  const GgufTensor* token_experts = nullptr;   ///< ffn_gate_tid2eid.weight [vocabulary, top_k]
  const GgufTensor* gate = nullptr;            ///< ffn_gate_exps.weight [E, I, H]
  const GgufTensor* up = nullptr;              ///< ffn_up_exps.weight [E, I, H]
  const GgufTensor* gate_up = nullptr;  ///< ffn_gate_up_exps.weight [E, 2I, H], gate rows first
  const GgufTensor* down = nullptr;     ///< ffn_down_exps.weight [E, H, I]
  const GgufTensor *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  ///< [E, rows]
  const GgufTensor *gate_scale = nullptr, *up_scale = nullptr, *down_scale = nullptr;  ///< [E]
  const GgufTensor *gate_up_bias = nullptr, *gate_up_scale = nullptr;  ///< [E, 2I] and [E]
  const GgufTensor *shared_gate = nullptr, *shared_up = nullptr, *shared_down = nullptr;
  const GgufTensor *shared_gate_scale = nullptr, *shared_up_scale = nullptr;  ///< [1]
  const GgufTensor* shared_down_scale = nullptr;                              ///< [1]
  const GgufTensor* shared_router = nullptr;  ///< ffn_gate_inp_shexp.weight [H]
  /// ffn_latent_{down,up}.weight or ffn_routed_{down,up}.weight, [L, H] and [H, L].
  const GgufTensor *latent_down = nullptr, *latent_up = nullptr;
  const GgufTensor *latent_down_scale = nullptr, *latent_up_scale = nullptr;  ///< [1]
  const GgufTensor* latent_norm = nullptr;  ///< ffn_routed_norm.weight [L]
  const GgufTensor* input_norm = nullptr;   ///< pre_ffw_norm_2.weight or ffn_norm_exps.weight [H]
  const GgufTensor* chunk_up = nullptr;     ///< ffn_up_chexps.weight (GroveMoE)
  /// Old Mixtral files: blk.N.ffn_{gate,up,down}.E.weight, one 2-D tensor per expert.
  std::vector<const GgufTensor*> expert_gate, expert_up, expert_down;
  /// Their factors, ffn_{gate,up,down}.E.scale [1]; empty, or one for each expert.
  std::vector<const GgufTensor*> expert_gate_scale, expert_up_scale, expert_down_scale;

  bool has_experts() const {
    return ((gate_up != nullptr || up != nullptr) && down != nullptr) || !expert_down.empty();
  }
};
/// Throws FormatError when one tensor per expert is stored and the experts have a gap.
MoeTensors find_moe_tensors(const GgufFile& file, std::int32_t layer);

}  // namespace moesaic
