#include "arguments.hpp"

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "base/nearest.hpp"
#include "docs.hpp"
#include "errors.hpp"
#include "signature.hpp"

namespace moesaic::python {
namespace {

using Record = py::detail::function_record;
using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

/// pybind11's own function, which every builtin of the module calls.
FastCall dispatch = nullptr;

/// The classes of the module by name. Never released, as the module is not.
const py::dict* module_classes = nullptr;

/// How users write the function: "route", "Routing", "MoeLayer.from_gguf".
std::string operation_of(const Record& record) {
  const std::string name = record.name != nullptr ? record.name : "";
  if (!record.scope || PyType_Check(record.scope.ptr()) == 0) return name;
  std::string type = py::str(record.scope.attr("__name__"));
  if (name == "__init__" || name == "__call__") return type;
  return name.empty() ? type : type + "." + name;
}

/// "MoeLayer(stack, config, ...)".
std::string short_call(const std::string& operation, const std::vector<Parameter>& parameters) {
  std::string text;
  bool optional = false;
  for (const Parameter& parameter : parameters) {
    optional |= !parameter.required;
    if (!parameter.required) continue;
    text += text.empty() ? "" : ", ";
    text += parameter.name + (parameter.keyword_only ? "=" : "");
  }
  if (optional) text += text.empty() ? "..." : ", ...";
  return operation + "(" + text + ")";
}

/// What makes an object of the class that was expected out of the one that was given.
struct Conversion {
  std::string_view expected, given, hint;
};
constexpr Conversion kConversions[] = {
    {"Routing", "ndarray", "Routing(ids, weights) or route(logits, top_k=...) makes one"},
    {"Routing", "Tensor", "Routing(ids, weights) or route(logits, top_k=...) makes one"},
    {"Routing", "tuple", "Routing(ids, weights) makes one"},
    {"BucketPlan", "Routing", "BucketPlan.build(routing, num_experts) makes one"},
    {"ExpertStack", "MoeLayer", "layer.stack is one"},
    {"ExpertStack", "str", "ExpertStack.open_and_load(path, layer) makes one"},
    {"ExpertStack", "GgufFile", "ExpertStack.load_from_gguf(file, layer) makes one"},
    {"MoeLayer", "ExpertStack", "MoeLayer(stack, config) makes one"},
    {"MoeLayer", "str", "MoeLayer.from_gguf(path, layer) makes one"},
    {"MoeLayer", "GgufFile", "MoeLayer.from_gguf(file, layer) makes one"},
    {"RouterConfig", "int", "give top_k by name: top_k=..."},
    {"RouterConfig", "dict", "RouterConfig(**it) makes one"},
    {"RouterConfig", "MoeConfig", "config.router is one"},
    {"MoeConfig", "dict", "MoeConfig(**it) makes one"},
    {"MoeConfig", "str", "MoeConfig.from_gguf or MoeConfig.from_hf makes one"},
    {"MoeConfig", "RouterConfig", "MoeConfig(..., router=it) makes one"},
    {"Workspace", "int", "Workspace(nbytes) or Workspace.for_layer(layer, tokens) makes one"},
    {"Tuning", "dict", "Tuning(**it) makes one"},
    {"SupportsInt", "float", "int(...) makes one"},
    {"SupportsInt", "str", "int(...) makes one"},
    {"SupportsFloat", "str", "float(...) makes one"},
    {"str", "dtype", "its name as a str, such as 'f32'"},
};

std::string conversion_hint(const Parameter& parameter, py::handle object) {
  const std::string_view given = last_part(Py_TYPE(object.ptr())->tp_name);
  for (const std::string& type : parameter.types) {
    for (const Conversion& conversion : kConversions) {
      if (conversion.expected == last_part(type) && conversion.given == given)
        return std::string(conversion.hint);
    }
  }
  return {};
}

/// A call as Python made it, matched with the parameters of the function.
class FailedCall {
 public:
  FailedCall(const Record& record, PyObject* const* arguments, Py_ssize_t flagged, PyObject* names)
      : operation_(operation_of(record)), signature_(read_signature(record.signature)) {
    parameters_ = signature_.parameters;
    positional_.assign(arguments, arguments + PyVectorcall_NARGS(flagged));
    const Py_ssize_t keywords = names != nullptr ? PyTuple_GET_SIZE(names) : 0;
    for (Py_ssize_t i = 0; i < keywords; ++i) {
      keywords_.emplace_back(py::str(py::handle(PyTuple_GET_ITEM(names, i))),
                             arguments[positional_.size() + static_cast<std::size_t>(i)]);
    }
    const bool method = !parameters_.empty() && parameters_.front().name == "self";
    if (!method) return;
    if (positional_.empty() || !fits(parameters_.front(), positional_.front(), *module_classes)) {
      const py::handle got = positional_.empty() ? py::handle() : py::handle(positional_.front());
      problem_ = {operation_,
                  "self",
                  types_text(parameters_.front()),
                  got ? object_text(got) : "nothing",
                  {}};
      return;
    }
    positional_.erase(positional_.begin());
    parameters_.erase(parameters_.begin());
  }

  Problem problem() {
    if (problem_.operation.empty() && problem_.what.empty()) {
      if (!too_many() && !unknown_keyword() && !given_twice() && !missing() && !wrong_type() &&
          !out_of_range()) {
        problem_ = {operation_, "arguments", "what its signature says", "something else",
                    short_call(operation_, parameters_)};
      }
    }
    return problem_;
  }

 private:
  bool too_many() {
    if (signature_.any_positional) return false;
    std::size_t most = 0;
    std::string more;
    for (const Parameter& parameter : parameters_) {
      if (!parameter.keyword_only) ++most;
      if (parameter.keyword_only && more.size() < 30) more += parameter.name + "=, ";
    }
    if (positional_.size() <= most) return false;
    std::string hint;
    if (!more.empty()) hint = "the rest by name: " + more.substr(0, more.size() - 2);
    problem_ = {operation_, "arguments",
                most == 0 ? "none by position" : "at most " + std::to_string(most) + " by position",
                std::to_string(positional_.size()), hint};
    // The first that is too many says which one was meant, where its kind does.
    const py::handle extra = positional_[most];
    for (const Parameter& parameter : parameters_) {
      const bool any = std::ranges::find(parameter.types, "object") != parameter.types.end();
      if (!parameter.keyword_only || any || extra.is_none()) continue;
      if (!fits_exactly(parameter, extra)) continue;
      problem_.hint = "give it by name: " + parameter.name + "=...";
      break;
    }
    return true;
  }

  /// fits, where what only counts as true or false is no bool.
  static bool fits_exactly(const Parameter& parameter, py::handle object) {
    const bool flag = std::ranges::find(parameter.types, "bool") != parameter.types.end();
    if (flag || PyBool_Check(object.ptr()) != 0) return flag && PyBool_Check(object.ptr()) != 0;
    return fits(parameter, object, *module_classes);
  }

  bool unknown_keyword() {
    if (signature_.any_keyword) return false;
    for (const auto& [name, value] : keywords_) {
      if (find(name) != nullptr) continue;
      std::vector<std::string_view> known;
      for (const Parameter& parameter : parameters_) known.push_back(parameter.name);
      std::string hint = nearest_hint(name, known);
      if (hint.empty() && operation_ == "MoeLayer" &&
          (name == "top_k" || name == "router" || name == "activation")) {
        hint = "a layer is made with it: config.replace(" + name + "=...)";
      }
      if (hint.empty() && !known.empty()) {
        for (const std::string_view one : known)
          hint += (hint.empty() ? "known: " : ", ") + std::string(one);
        constexpr std::size_t kRoom = 110;
        if (hint.size() > kRoom) hint = hint.substr(0, hint.rfind(',', kRoom)) + ", ...";
      }
      problem_ = {operation_, name.substr(0, 40), {}, "an unknown keyword", hint};
      return true;
    }
    return false;
  }

  bool given_twice() {
    for (const auto& [name, value] : keywords_) {
      const Parameter* parameter = find(name);
      if (parameter == nullptr || parameter->keyword_only) continue;
      if (static_cast<std::size_t>(parameter - parameters_.data()) < positional_.size()) {
        problem_ = {operation_, name, "one value", "one by position and one by name", {}};
        return true;
      }
    }
    return false;
  }

  bool missing() {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& parameter = parameters_[i];
      if (!parameter.required || given(i)) continue;
      std::string expected = types_text(parameter);
      if (expected.empty() || expected == "an object") expected = "a value";
      problem_ = {operation_, parameter.name, expected, "nothing",
                  short_call(operation_, parameters_)};
      return true;
    }
    return false;
  }

  bool wrong_type() {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const py::handle object = given(i);
      if (!object || fits(parameters_[i], object, *module_classes)) continue;
      std::string hint = swapped_hint(i, object);
      if (hint.empty()) hint = conversion_hint(parameters_[i], object);
      problem_ = {operation_, parameters_[i].name, types_text(parameters_[i]), object_text(object),
                  hint};
      return true;
    }
    return false;
  }

  /// Integers of Python have any size; those of C++ do not.
  bool out_of_range() {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const py::handle object = given(i);
      if (!object || PyLong_Check(object.ptr()) == 0) continue;
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
      constexpr long long kLargest = 2147483647;
      if (overflow == 0 && value >= 0 && value <= kLargest) continue;
      problem_ = {operation_,
                  parameters_[i].name,
                  overflow == 0 && value < 0 ? "an int of at least 0" : "a smaller int",
                  object_text(object),
                  {}};
      return true;
    }
    return false;
  }

  std::string swapped_hint(std::size_t i, py::handle object) const {
    for (std::size_t j = 0; j < parameters_.size(); ++j) {
      const py::handle other = given(j);
      if (j == i || !other || parameters_[j].types == std::vector<std::string>{"object"}) continue;
      if (!fits(parameters_[j], other, *module_classes) && fits_exactly(parameters_[j], object) &&
          fits_exactly(parameters_[i], other)) {
        return parameters_[i].name + " and " + parameters_[j].name + " are swapped";
      }
    }
    return {};
  }

  const Parameter* find(const std::string& name) const {
    const auto at = std::ranges::find(parameters_, name, &Parameter::name);
    return at == parameters_.end() ? nullptr : &*at;
  }

  /// The object given for a parameter; null for none.
  py::handle given(std::size_t i) const {
    if (i < positional_.size() && !parameters_[i].keyword_only) return positional_[i];
    const auto at = std::ranges::find(keywords_, parameters_[i].name,
                                      [](const auto& keyword) { return keyword.first; });
    return at == keywords_.end() ? py::handle() : py::handle(at->second);
  }

  std::string operation_;
  Signature signature_;
  std::vector<Parameter> parameters_;
  std::vector<PyObject*> positional_;
  std::vector<std::pair<std::string, PyObject*>> keywords_;
  Problem problem_;
};

/// Replaces the error in flight where it is one that pybind11 made of arguments that do not fit.
void replace_error(PyObject* self, PyObject* const* arguments, Py_ssize_t flagged,
                   PyObject* names) {
  py::error_already_set error;
  const Record* record = py::detail::function_record_ptr_from_PyObject(self);
  if (error.type().ptr() != PyExc_TypeError || record == nullptr) return error.restore();
  const std::string text = py::str(error.value());
  const std::string name = record->name != nullptr ? record->name : "";
  try {
    if (text.starts_with(name + "(): incompatible ") || text.starts_with("__init__(self, ...)")) {
      return set_argument_error(FailedCall(*record, arguments, flagged, names).problem());
    }
    // A value inside of an argument that pybind11 takes as any object.
    if (text.starts_with("Unable to cast Python instance")) {
      return set_argument_error({operation_of(*record),
                                 "arguments",
                                 {},
                                 "an object of another kind than documented",
                                 "help() has the kinds"});
    }
  } catch (const std::exception&) {
    // What cannot be explained is raised as it came.
    PyErr_Clear();
  }
  error.restore();
}

/// The call as users write it; empty for what only Python and this package call.
std::string public_call(PyObject* self) {
  const Record* record = py::detail::function_record_ptr_from_PyObject(self);
  if (record == nullptr) return {};
  std::string name = operation_of(*record);
  return name.starts_with('_') || name.find("._") != std::string::npos ? std::string() : name;
}

void explain_error(PyObject* self, PyObject* const* arguments, Py_ssize_t flagged,
                   PyObject* names) {
  if (is_library_error(PyErr_Occurred())) {
    std::string called;
    {
      const py::error_scope in_flight;  // Python must not be asked for names while an error is set
      called = public_call(self);
    }
    if (!called.empty()) name_called(called);
  } else if (PyErr_ExceptionMatches(PyExc_TypeError) != 0) {
    replace_error(self, arguments, flagged, names);
  }
}

PyObject* guarded(PyObject* self, PyObject* const* arguments, Py_ssize_t flagged, PyObject* names) {
  PyObject* const result = dispatch(self, arguments, flagged, names);
  if (result == nullptr && PyErr_Occurred() != nullptr) [[unlikely]]
    explain_error(self, arguments, flagged, names);
  return result;
}

void guard(PyCFunctionObject* function) {
  if (function == nullptr) return;
  PyCFunction& method = function->m_ml->ml_meth;
  const auto found = reinterpret_cast<FastCall>(reinterpret_cast<void (*)()>(method));
  if (found == &guarded) return;
  if (dispatch == nullptr) dispatch = found;
  if (found != dispatch) return;
  method = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&guarded));
}

}  // namespace

void guard_calls(py::module_& m) {
  auto* const own = new py::dict();
  for (const auto& [name, value] : m.attr("__dict__").cast<py::dict>()) {
    if (PyType_Check(value.ptr()) == 0) {
      guard(builtin_in(value));
      continue;
    }
    (*own)[name] = value;
    for (const auto& [member, attribute] : value.attr("__dict__").attr("copy")().cast<py::dict>())
      guard(builtin_in(attribute));
  }
  module_classes = own;
}

}  // namespace moesaic::python
