#include "load.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>

#include "arrays.hpp"
#include "base/cache_file.hpp"
#include "base/nearest.hpp"
#include "calls.hpp"
#include "expert_ids.hpp"
#include "fields.hpp"
#include "gil.hpp"
#include "logging.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

QuantType parse_dense(const std::string& text, const char* operation) {
  if (text == "f32") return QuantType::F32;
  if (text == "f16") return QuantType::F16;
  if (text == "bf16") return QuantType::BF16;
  constexpr std::string_view kKnown[] = {"f32", "f16", "bf16"};
  throw ConfigError(Problem{operation, "dequantize", "f32 | f16 | bf16", quoted_word(text),
                            nearest_hint(text, kKnown)});
}

std::string line_of(const RoleReport& role) {
  std::string text = std::string(name_of(role.role)) + ": " + std::string(traits(role.stored).name);
  if (role.kept != role.stored) text += " -> " + std::string(traits(role.kept).name);
  text += " " + role.decision + ", " + std::to_string(role.bytes) + " bytes, " + role.source;
  if (!role.reason.empty()) text += " (" + role.reason + ")";
  return text;
}

std::string report_text(const LoadReport& report) {
  std::string text;
  for (const RoleReport& role : report.roles) text += line_of(role) + "\n";
  return text + "loaded in " + std::to_string(report.seconds) + " s";
}

}  // namespace

Loading::Loading(const char* operation, const std::string& device, const std::string& layout,
                 const std::optional<std::string>& dequantize, const py::object& progress) {
  const Tuning& tuning = current_tuning();
  pool_ = shared_pool(tuning);
  options_.backend = &backend_for(parse_device(device));
  options_.pool = pool_.get();
  options_.layout = parse_name<StackLayout>(layout, operation, "layout");
  if (dequantize) options_.dequantize = parse_dense(*dequantize, operation);
  if (py::isinstance<py::bool_>(progress)) {
    if (progress.cast<bool>())
      callback_ = call_python(py::module_::import("moesaic._progress").attr("bar"), py::tuple());
  } else if (!progress.is_none()) {
    require<DTypeError>(PyCallable_Check(progress.ptr()) != 0, [&] {
      return Problem{
          operation, "progress", "a callable, True or None", Py_TYPE(progress.ptr())->tp_name, {}};
    });
    callback_ = progress;
  }
  options_.progress = [this](const Progress& p) { return report(p); };
}

std::optional<std::vector<std::int32_t>> Loading::keep(const py::object& experts,
                                                       const char* operation) {
  if (!experts.is_none()) options_.experts = import_expert_ids(experts, operation, "experts");
  return options_.experts;
}

py::object Loading::keep_panels(const py::object& weight_cache, const GgufFile& file,
                                const char* operation) {
  return keep_panels(
      weight_cache, [&](const std::filesystem::path& parent) { return file.weight_cache(parent); },
      operation);
}

py::object Loading::keep_panels(const py::object& weight_cache, const CacheFolder& folder,
                                const char* operation) {
  if (py::isinstance<py::bool_>(weight_cache)) {
    if (weight_cache.cast<bool>()) options_.weight_cache = folder({});
    return weight_cache;
  }
  const bool path =
      py::isinstance<py::str>(weight_cache) || py::hasattr(weight_cache, "__fspath__");
  require<DTypeError>(path, [&] {
    return Problem{
        operation, "weight_cache", "True, False, or a path", type_name(weight_cache), {}};
  });
  const auto parent = std::filesystem::absolute(weight_cache.cast<std::filesystem::path>());
  options_.weight_cache = folder(parent);
  return path_to_python(parent);
}

bool Loading::multiplies(QuantType type) const {
  const std::vector<KernelInfo> kernels = options_.backend->kernels();
  return std::ranges::find(kernels, type, &KernelInfo::type) != kernels.end();
}

bool Loading::report(const Progress& progress) {
  const HeldGil gil;
  try {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!callback_) return true;
    const py::object answer = call_python(callback_, py::make_tuple(progress));
    return !answer.is(py::bool_(false));
  } catch (...) {
    error_ = std::current_exception();
    return false;
  }
}

void Loading::step(const Progress& progress) {
  if (report(progress)) return;
  if (error_) std::rethrow_exception(error_);
  throw OperationCancelled(
      Problem{"load", progress.what, {}, "cancelled by the progress callback", {}});
}

void log_report(const char* operation, const LoadReport& report) {
  if (!log_enabled(kLogInfo)) return;
  for (const RoleReport& role : report.roles)
    log(kLogInfo, std::string(operation) + ": " + line_of(role));
}

void bind_load(py::module_& m) {
  py::class_<Progress> progress(m, "Progress", py::is_final());
  progress.def("__repr__", [](const Progress& p) {
    return message_to_python("moesaic.Progress(" + std::to_string(p.done_bytes) + " of " +
                             std::to_string(p.total_bytes) + " bytes, " + p.what + ")");
  });
  define_value(progress, Fields<Progress>("Progress")
                             .add("done_bytes", &Progress::done_bytes)
                             .add("total_bytes", &Progress::total_bytes)
                             .add("what", &Progress::what));
  m.def(
      "make_progress",
      [](std::int64_t done_bytes, std::int64_t total_bytes, const Text& what) {
        return Progress{done_bytes, total_bytes, what.bytes};
      },
      py::arg("done_bytes"), py::arg("total_bytes"), py::arg("what"));
  m.def(
      "_check_cached",
      [](const std::filesystem::path& path) {
        const InterruptibleRelease release;
        return check_entry(path);
      },
      py::arg("path"));
  py::class_<RoleReport> role(m, "RoleReport", py::is_final());
  role.def("__repr__", [](const RoleReport& r) {
    return message_to_python("moesaic.RoleReport(" + line_of(r) + ")");
  });
  define_value(role, Fields<RoleReport>("RoleReport")
                         .add("role", &RoleReport::role)
                         .add("stored", &RoleReport::stored)
                         .add("kept", &RoleReport::kept)
                         .add("source", &RoleReport::source)
                         .add("decision", &RoleReport::decision)
                         .add("reason", &RoleReport::reason)
                         .add("nbytes", &RoleReport::bytes));
  py::class_<LoadReport> report(m, "LoadReport", py::is_final());
  report.def("__str__", [](const LoadReport& r) { return message_to_python(report_text(r)); })
      .def("__repr__", [](const LoadReport& r) {
        return "moesaic.LoadReport(" + std::to_string(r.roles.size()) + " roles)";
      });
  define_value(report, Fields<LoadReport>("LoadReport")
                           .add("roles", &LoadReport::roles)
                           .add("seconds", &LoadReport::seconds));
}

}  // namespace moesaic::python
