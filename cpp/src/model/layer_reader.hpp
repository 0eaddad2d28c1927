#pragma once

/// Keys and tensors of one layer of a file, looked up with errors that name them.

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/block_reader.hpp"
#include "model/model.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic {

class LayerReader {
 public:
  /// `architecture` as the file spells it, which is how its keys begin.
  LayerReader(const BlockReader& block, std::string_view architecture)
      : block_(block),
        file_(block.file()),
        layer_(block.layer()),
        prefix_(std::string(architecture) + ".") {}

  std::string key(std::string_view name) const { return prefix_ + std::string(name); }
  std::string tensor_name(std::string_view name) const {
    return "blk." + std::to_string(layer_) + "." + std::string(name);
  }

  /// A size of this layer: at least 1 and within int32. Empty when the key is absent.
  std::optional<std::int64_t> size(std::string_view name) const {
    const auto value = file_.integer_for_layer(key(name), layer_);
    if (value) check_size(name, *value);
    return value;
  }
  std::int64_t required_size(std::string_view name) const {
    const auto value = size(name);
    require<FormatError>(value.has_value(), [&] { return missing(key(name)); });
    return *value;
  }
  /// The value of a key that is looked at; empty when it is ignored or absent.
  std::optional<double> number(std::string_view name, Use use) const {
    if (use == Use::Ignored) return std::nullopt;
    const auto value = checked(file_.number_for_layer(key(name), layer_), name, use);
    require<FormatError>(!value || std::isfinite(*value), [&] {
      return problem(key(name), "a finite number", std::to_string(*value));
    });
    return value;
  }
  std::optional<std::int64_t> integer(std::string_view name, Use use) const {
    if (use == Use::Ignored) return std::nullopt;
    return checked(file_.integer_for_layer(key(name), layer_), name, use);
  }
  std::optional<bool> boolean(std::string_view name, Use use) const {
    if (use == Use::Ignored) return std::nullopt;
    return checked(file_.boolean(key(name)), name, use);
  }

  Problem problem(std::string what, std::string expected, std::string got) const {
    return {"MoeConfig::from_gguf", std::move(what), std::move(expected), std::move(got),
            file_.path().string()};
  }
  Problem missing(const std::string& what) const { return problem(what, "a value", "nothing"); }

  /// Throws unless an absent or present tensor agrees with its use.
  void check_use(const GgufTensor* tensor, std::string_view name, Use use) const {
    require<FormatError>(tensor != nullptr || use != Use::Required,
                         [&] { return missing(tensor_name(name)); });
    require<FormatError>(tensor == nullptr || use != Use::Ignored, [&] {
      return problem(tensor->name, "no such tensor in this architecture", "one");
    });
  }

  void check_shape(const GgufTensor* tensor, std::initializer_list<std::int64_t> shape) const {
    if (tensor == nullptr || tensor->has_shape(shape)) return;
    throw FormatError(
        problem(tensor->name, describe(shape.begin(), shape.end()), tensor->shape_text()));
  }

  /// Empty when there is no tensor.
  std::vector<float> vector(const GgufTensor* tensor, std::int64_t count) const {
    if (tensor == nullptr) return {};
    check_shape(tensor, {count});
    const GgufBytes bytes = block_.read(*tensor);
    std::vector<float> values(static_cast<std::size_t>(count));
    dequantize_row(tensor->quant, bytes.bytes.data(), values.data(), count);
    return values;
  }

 private:
  void check_size(std::string_view name, std::int64_t value) const {
    require<FormatError>(value >= 1 && value <= std::numeric_limits<std::int32_t>::max(), [&] {
      return problem(key(name), "a size of at least 1 for block " + std::to_string(layer_),
                     std::to_string(value));
    });
  }
  template <class T>
  std::optional<T> checked(std::optional<T> value, std::string_view name, Use use) const {
    require<FormatError>(value.has_value() || use == Use::Optional,
                         [&] { return missing(key(name)); });
    return value;
  }
  static std::string describe(const std::int64_t* begin, const std::int64_t* end) {
    std::string text = "[";
    for (const std::int64_t* at = begin; at != end; ++at) {
      if (at != begin) text += ", ";
      text += std::to_string(*at);
    }
    return text + "]";
  }

  const BlockReader& block_;
  const GgufFile& file_;
  std::int32_t layer_;
  std::string prefix_;
};

}  // namespace moesaic
