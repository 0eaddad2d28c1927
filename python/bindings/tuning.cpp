#include "moesaic/tuning.hpp"

#include <pybind11/stl.h>

#include "calls.hpp"
#include "fields.hpp"
#include "logging.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

// A context variable object, never released.
PyObject* tuning_variable = nullptr;

constexpr std::string_view kSwitches[] = {"batch_invariant", "strict", "poison"};
constexpr std::string_view kNumbers[] = {"block_size", "large_m_block_size", "large_m_min_pairs",
                                         "threads"};
constexpr std::string_view kOptionalWords[] = {"cpu_isa", "backend", "cuda_plugin"};
constexpr std::string_view kNodes = "numa";  // a number, or "off"

template <std::size_t N>
bool contains(const std::string_view (&names)[N], std::string_view name) {
  return std::ranges::find(names, name) != std::end(names);
}

/// A Python value as the text that the knob's one parser reads.
std::string to_text(py::handle value) {
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>() ? "true" : "false";
  return text_bytes(py::str(value));
}

py::object to_python(const ConfigEntry& entry) {
  if (contains(kSwitches, entry.knob)) return py::bool_(entry.value == "on");
  const bool number =
      contains(kNumbers, entry.knob) || (entry.knob == kNodes && entry.value != "off");
  if ((number || contains(kOptionalWords, entry.knob)) && entry.value == "auto") return py::none();
  if (number) return py::int_(std::stoll(entry.value));
  return py::str(entry.value);
}

py::dict tuning_dict(const Tuning& tuning) {
  py::dict fields;
  for (const ConfigEntry& entry : show_config(tuning, Tuning{}))
    fields[py::str(entry.knob)] = to_python(entry);
  return fields;
}

void set_field(Tuning& tuning, const std::string& knob, py::handle value) {
  set_knob(tuning, knob, value.is_none() ? "auto" : to_text(value));
}

Tuning replace(const Tuning& tuning, const py::kwargs& changes) {
  Tuning changed = tuning;
  for (const auto& [knob, value] : changes) set_field(changed, text_bytes(knob), value);
  changed.validate();
  return changed;
}

std::string tuning_repr(const Tuning& tuning) {
  const py::dict fields = tuning_dict(tuning), defaults = tuning_dict(Tuning{});
  std::string text;
  for (const auto& [knob, value] : fields) {
    if (value.equal(defaults[knob])) continue;
    text += (text.empty() ? "" : ", ") + std::string(py::str(knob)) + "=" +
            std::string(py::repr(value));
  }
  return "moesaic.Tuning(" + text + ")";
}

Tuning from_env(const std::optional<std::map<std::string, std::string>>& variables) {
  if (!variables) return Tuning::process();
  const std::vector<std::pair<std::string, std::string>> pairs(variables->begin(),
                                                               variables->end());
  return Tuning::from_env(pairs, [](const std::string& text) { log(kLogWarning, text); });
}

const Tuning& process_tuning() {
  const Tuning& tuning = Tuning::process();
  static std::atomic<bool> reported{false};
  if (!reported.exchange(true)) {
    // LogLevel counts off, error, warn, info, debug; logging 60, 40, 30, 20, 10.
    constexpr int kLevels[] = {60, 40, 30, 20, 10};
    if (tuning.log != Tuning{}.log) set_log_level(kLevels[static_cast<int>(tuning.log)]);
    for (const std::string& text : Tuning::process_warnings()) log(kLogWarning, text);
  }
  return tuning;
}

}  // namespace

const Tuning& current_tuning() {
  PyObject* value = nullptr;
  if (PyContextVar_Get(tuning_variable, nullptr, &value) < 0) throw py::error_already_set();
  // The context holds another reference.
  const auto held = py::reinterpret_steal<py::object>(value);
  if (!held || held.is_none()) return process_tuning();
  return held.cast<const Tuning&>();
}

std::shared_ptr<ThreadPool> shared_pool(const Tuning& tuning) {
  return ThreadPool::shared(tuning.threads.value_or(0), tuning.numa.count);
}

std::optional<Precision> parse_precision(const std::optional<std::string>& text,
                                         const char* operation) {
  if (!text) return std::nullopt;
  const auto precision = parse_name<Precision>(*text, operation, "precision");
  return precision == Precision::Auto ? std::nullopt : std::optional(precision);
}

namespace {
Tuning tuning_for(std::optional<Precision> precision) {
  Tuning tuning = current_tuning();
  if (precision) tuning.precision = *precision;
  return tuning;
}
}  // namespace

Call::Call(std::optional<Precision> precision, Device device)
    : profiler(current_profiler()), context(device, tuning_for(precision)) {
  context.attach(profiler.get());
}

void bind_tuning(py::module_& m) {
  tuning_variable = PyContextVar_New("moesaic.tuning", Py_None);
  if (tuning_variable == nullptr) throw py::error_already_set();
  m.attr("tuning_variable") = py::handle(tuning_variable);

  py::class_<Tuning> tuning(m, "Tuning", py::is_final());
  tuning
      .def(py::init([](const py::object& block_size, const py::object& large_m_block_size,
                       const py::object& large_m_min_pairs, const py::object& gemm,
                       const py::object& route, const py::object& row_space,
                       const py::object& precision, const py::object& batch_invariant,
                       const py::object& profile, const py::object& strict,
                       const py::object& threads, const py::object& numa, const py::object& cpu_isa,
                       const py::object& backend, const py::object& cuda_plugin,
                       const py::object& log_level, const py::object& poison) {
             Tuning value;
             set_field(value, "block_size", block_size);
             set_field(value, "large_m_block_size", large_m_block_size);
             set_field(value, "large_m_min_pairs", large_m_min_pairs);
             set_field(value, "gemm", gemm);
             set_field(value, "route", route);
             set_field(value, "row_space", row_space);
             set_field(value, "precision", precision);
             set_field(value, "batch_invariant", batch_invariant);
             set_field(value, "profile", profile);
             set_field(value, "strict", strict);
             set_field(value, "threads", threads);
             set_field(value, "numa", numa);
             set_field(value, "cpu_isa", cpu_isa);
             set_field(value, "backend", backend);
             set_field(value, "cuda_plugin", cuda_plugin);
             set_field(value, "log", log_level);
             set_field(value, "poison", poison);
             return value;
           }),
           py::kw_only(), py::arg("block_size") = py::none(),
           py::arg("large_m_block_size") = py::none(), py::arg("large_m_min_pairs") = 1024,
           py::arg("gemm") = "auto", py::arg("route") = "auto", py::arg("row_space") = "auto",
           py::arg("precision") = "auto", py::arg("batch_invariant") = false,
           py::arg("profile") = "off", py::arg("strict") = false, py::arg("threads") = py::none(),
           py::arg("numa") = py::none(), py::arg("cpu_isa") = py::none(),
           py::arg("backend") = py::none(), py::arg("cuda_plugin") = py::none(),
           py::arg("log") = "warn", py::arg("poison") = false)
      .def_static("from_env", &from_env, py::arg("variables") = py::none())
      .def("replace", &replace)
      .def("__repr__", &tuning_repr);
  Fields<Tuning> knobs("Tuning");
  for (const ConfigEntry& entry : show_config(Tuning{}, Tuning{})) {
    knobs.view(entry.knob.c_str(), [knob = entry.knob](const Tuning& t) -> py::object {
      return tuning_dict(t)[py::str(knob)];
    });
  }
  ValueOptions options = constructed<Tuning>();
  options.replace = options.repr = false;
  define_value(tuning, knobs, options);

  py::class_<ConfigEntry> entry(m, "ConfigEntry", py::is_final());
  entry.def("__repr__", [](const ConfigEntry& e) {
    return "moesaic.ConfigEntry(" + e.knob + "=" + e.value + ", " + e.source + ")";
  });
  define_value(entry, Fields<ConfigEntry>("ConfigEntry")
                          .add("knob", &ConfigEntry::knob)
                          .add("variable", &ConfigEntry::variable)
                          .add("value", &ConfigEntry::value)
                          .add("source", &ConfigEntry::source)
                          .add("help", &ConfigEntry::help));

  m.def("borrow_openmp", &ThreadPool::borrow_openmp, py::arg("library"));
  m.def("current_tuning", [] { return Tuning(current_tuning()); });
  m.def("show_config", [] { return show_config(current_tuning(), process_tuning()); });
}

}  // namespace moesaic::python
