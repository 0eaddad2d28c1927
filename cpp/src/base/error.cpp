#include "moesaic/error.hpp"

#include <system_error>

namespace moesaic {

std::string format_problem(const Problem& problem) {
  std::string text;
  const auto append = [&text](std::string_view separator, std::string_view part) {
    if (part.empty()) return;
    if (!text.empty()) text += separator;
    text += part;
  };
  append("", problem.operation);
  append(": ", problem.what);
  if (!problem.expected.empty()) append(": ", "expected " + problem.expected);
  if (!problem.got.empty()) {
    append(problem.expected.empty() ? ": " : ", ", "got " + problem.got);
  }
  if (!problem.hint.empty()) append(" ", "(" + problem.hint + ")");
  return text;
}

IoError::IoError(int code, std::string path, const std::string& operation)
    : Error(Problem{operation, path, "", std::generic_category().message(code), ""}),
      code_(code),
      path_(std::move(path)) {}

}  // namespace moesaic
