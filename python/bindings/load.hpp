#pragma once

#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "gil.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::python {

/// Options of one load, with what they refer to. Make and destroy it with the GIL.
class Loading {
 public:
  /// Reads the arguments of a load. Errors: ConfigError, DeviceError, DTypeError.
  Loading(const char* operation, const std::string& device, const std::string& layout,
          const std::optional<std::string>& dequantize, const py::object& progress);
  Loading(const Loading&) = delete;
  Loading& operator=(const Loading&) = delete;

  /// Keeps only the experts of a list, a range or an array of ids; None: all. Returns the ids, for the
  /// arguments that pickles have.
  std::optional<std::vector<std::int32_t>> keep(const py::object& experts, const char* operation);

  /// The folder for the repacked weights of a model, within one of the caller or, where that is
  /// empty, beside the model.
  using CacheFolder = std::function<std::filesystem::path(const std::filesystem::path& parent)>;
  /// Keeps repacked weights: True, beside the model; a path, in a folder of its name there; False,
  /// not. Returns the argument as pickles have it. Errors: DTypeError.
  py::object keep_panels(const py::object& weight_cache, const CacheFolder& folder,
                         const char* operation);
  py::object keep_panels(const py::object& weight_cache, const GgufFile& file,
                         const char* operation);
  bool keeps_panels() const { return options_.weight_cache.has_value(); }

  /// Whether the device of the load has kernels for weights of this type.
  bool multiplies(QuantType type) const;

  /// Calls load(options) without the GIL; an exception of the callback and Ctrl-C come out as
  /// themselves.
  template <class Load>
  auto run(Load&& load) {
    try {
      const InterruptibleRelease release;
      return load(static_cast<const LoadOptions&>(options_));
    } catch (const OperationCancelled&) {
      if (error_) std::rethrow_exception(error_);
      throw;
    }
  }

  /// Reports from Python code, with the GIL. Throws what the callback raised, or
  /// OperationCancelled.
  void step(const Progress& progress);

 private:
  bool report(const Progress& progress);
  std::shared_ptr<ThreadPool> pool_;
  LoadOptions options_;
  py::object callback_;
  std::exception_ptr error_;
};

/// Writes what happened at load to the log, at level info.
void log_report(const char* operation, const LoadReport& report);

}  // namespace moesaic::python
