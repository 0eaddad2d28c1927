#pragma once

/// The error family. Every message names the operation, what is wrong, what was expected, what was
/// got and, where one exists, a hint. Python mirrors these classes one to one.

#include <concepts>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace moesaic {

/// The parts of a message; empty parts are left out.
struct Problem {
  std::string operation;  ///< the call that failed, e.g. "moe_forward"
  std::string what;       ///< the argument or file position, e.g. "x.shape[1]"
  std::string expected;
  std::string got;
  std::string hint;
};

/// "operation: what: expected E, got G (hint)".
std::string format_problem(const Problem& problem);

class Error : public std::runtime_error {
 public:
  explicit Error(const Problem& problem)
      : std::runtime_error(format_problem(problem)),
        problem_(std::make_shared<const Problem>(problem)) {}
  /// A message without parts; it counts as `what`.
  explicit Error(const std::string& message) : Error(Problem{{}, message, {}, {}, {}}) {}

  /// The parts of the message.
  const Problem& problem() const noexcept { return *problem_; }

 private:
  // Shared, so that a copy of an exception allocates nothing.
  std::shared_ptr<const Problem> problem_;
};

// clang-format off
struct ShapeError : Error { using Error::Error; };        ///< a size or stride does not fit (ValueError)
struct FormatError : Error { using Error::Error; };       ///< a file is malformed or inconsistent (ValueError)
struct WorkspaceError : Error { using Error::Error; };    ///< a workspace is too small or in use (ValueError)
struct ConfigError : Error { using Error::Error; };       ///< a setting has a bad value (ValueError)
struct DTypeError : Error { using Error::Error; };        ///< an element type is not accepted (TypeError)
struct UnsupportedError : Error { using Error::Error; };  ///< valid, but not available here (NotImplementedError)
struct DeviceError : Error { using Error::Error; };       ///< a device is absent or failed (RuntimeError)
struct CaptureError : Error { using Error::Error; };      ///< not possible while a graph is captured (RuntimeError)
struct OutOfMemoryError : Error { using Error::Error; };  ///< an allocation failed (MemoryError)
// clang-format on

/// A failed system call on a file. `code()` is the errno value; Python raises the matching OSError.
class IoError : public Error {
 public:
  IoError(int code, std::string path, const std::string& operation);
  int code() const noexcept { return code_; }
  const std::string& path() const noexcept { return path_; }

 private:
  int code_;
  std::string path_;
};

/// Throws `E` when `ok` is false. `make` builds the Problem only then.
template <class E, std::invocable Make>
inline void require(bool ok, Make&& make) {
  if (!ok) [[unlikely]]
    throw E(std::forward<Make>(make)());
}

}  // namespace moesaic
