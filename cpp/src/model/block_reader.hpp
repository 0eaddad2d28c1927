#pragma once

/// One block of a file, and which of its tensors were read.

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>

#include "moesaic/gguf.hpp"

namespace moesaic {

/// Whoever reads a tensor of a layer reads it here. So what was left out shows at the end, whatever
/// it is called: a scale that nobody applied gives plausible numbers.
class BlockReader {
 public:
  /// `operation` is what errors about a tensor name.
  BlockReader(const GgufFile& file, std::int32_t layer, const char* operation = "load_from_gguf")
      : file_(file), layer_(layer), operation_(operation) {}

  const GgufFile& file() const { return file_; }
  std::int32_t layer() const { return layer_; }
  const char* operation() const { return operation_; }

  /// GgufFile::bytes; the tensor counts as used from now on.
  GgufBytes bytes(const GgufTensor& tensor) const {
    used_.insert(&tensor);
    return file_.bytes(tensor);
  }
  /// Some bytes of the tensor, by GgufFile::bytes; the tensor counts as used from now on.
  GgufBytes bytes(const GgufTensor& tensor, std::int64_t begin, std::int64_t size) const {
    used_.insert(&tensor);
    return file_.bytes(tensor, static_cast<std::uint64_t>(begin), static_cast<std::uint64_t>(size));
  }
  /// Counts the tensor as used: it is left out on purpose.
  void pass_over(const GgufTensor& tensor) const { used_.insert(&tensor); }
  /// GgufFile::read; the tensor counts as used from now on.
  GgufBytes read(const GgufTensor& tensor) const {
    used_.insert(&tensor);
    return file_.read(tensor);
  }

  /// Which tensors a check is about.
  enum class Scope : std::uint8_t {
    RoutedExperts,  ///< ffn_{gate,up,down,gate_up}_exps and one tensor per expert, with epilogues
    Rest,           ///< everything else of the layer
  };
  /// Throws FormatError that names the first tensor of the block which belongs to its MoE layer by
  /// `scope` and was not used. `others` are names (the part between "blk.N." and the next dot), with
  /// spaces between, of tensors that are the caller's in this architecture.
  void check_all_used(const char* operation, Scope scope, std::string_view others = {}) const;

 private:
  const GgufFile& file_;
  std::int32_t layer_;
  const char* operation_;
  mutable std::unordered_set<const GgufTensor*> used_;
};

/// Whether `name`, behind "blk.N.", is of the routed experts: "ffn_up_exps.scale", "ffn_up.3.weight".
bool is_routed_expert(std::string_view name);

/// Whether `words`, with spaces between, have `word` among them.
bool has_word(std::string_view words, std::string_view word);

}  // namespace moesaic
