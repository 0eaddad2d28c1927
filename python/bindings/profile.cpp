#include "moesaic/profile.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cerrno>
#include <fstream>

#include "calls.hpp"
#include "fields.hpp"
#include "gil.hpp"
#include "moesaic/error.hpp"

namespace moesaic::python {
namespace {

// The context variable that profile() sets, never released.
PyObject* profile_variable = nullptr;

std::shared_ptr<Profiler> make_profiler(const std::string& mode) {
  require<ConfigError>(mode == "counters" || mode == "events" || mode == "sync", [&] {
    return Problem{"profile", "mode", "counters | events | sync", "'" + mode + "'", {}};
  });
  return std::make_shared<Profiler>(mode != "counters", mode == "sync");
}

py::dict zones(const Profiler& profiler) {
  py::dict result;
  for (std::size_t i = 0; i < static_cast<std::size_t>(Zone::Count); ++i) {
    const auto zone = static_cast<Zone>(i);
    const ZoneTotal total = profiler.zone(zone);
    if (total.calls > 0) result[py::str(name_of(zone))] = total;
  }
  return result;
}

py::dict counters(const Profiler& profiler) {
  py::dict result;
  for (std::size_t i = 0; i < static_cast<std::size_t>(Counter::Count); ++i) {
    const auto counter = static_cast<Counter>(i);
    result[py::str(name_of(counter))] = profiler.counter(counter);
  }
  return result;
}

void save_chrome_trace(const Profiler& profiler, const std::filesystem::path& path) {
  const std::string json = profiler.chrome_trace();
  errno = 0;
  std::ofstream file(path, std::ios::binary);
  file << json;
  file.close();
  if (!file) throw IoError(errno != 0 ? errno : EIO, path.string(), "Profile.save_chrome_trace");
}

}  // namespace

std::shared_ptr<Profiler> current_profiler() {
  PyObject* value = nullptr;
  if (PyContextVar_Get(profile_variable, nullptr, &value) < 0) throw py::error_already_set();
  const auto held = py::reinterpret_steal<py::object>(value);
  if (!held || held.is_none()) return nullptr;
  return held.cast<std::shared_ptr<Profiler>>();
}

void bind_profile(py::module_& m) {
  profile_variable = PyContextVar_New("moesaic.profile", Py_None);
  if (profile_variable == nullptr) throw py::error_already_set();
  m.attr("profile_variable") = py::handle(profile_variable);

  py::class_<ZoneTotal> total(m, "ZoneTotal", py::is_final());
  total
      .def_property_readonly(
          "seconds", [](const ZoneTotal& t) { return 1e-9 * static_cast<double>(t.nanoseconds); })
      .def("__repr__", [](const ZoneTotal& t) {
        return "moesaic.ZoneTotal(calls=" + std::to_string(t.calls) +
               ", nanoseconds=" + std::to_string(t.nanoseconds) + ")";
      });
  define_value(total, Fields<ZoneTotal>("ZoneTotal")
                          .add("calls", &ZoneTotal::calls)
                          .add("nanoseconds", &ZoneTotal::nanoseconds));

  py::class_<Profiler, std::shared_ptr<Profiler>>(m, "Profile", py::is_final())
      .def(py::init(&make_profiler), py::arg("mode") = "events")
      .def_property_readonly("zones", &zones)
      .def_property_readonly("counters", &counters)
      .def("chrome_trace", &Profiler::chrome_trace)
      .def("save_chrome_trace", &save_chrome_trace, py::arg("path"))
      .def("reset", &Profiler::reset)
      .def("_repr_html_",
           [](const py::object& p) {
             return call_python(py::module_::import("moesaic._report").attr("html_of_profile"),
                                py::make_tuple(p));
           })
      .def("__repr__", [](const Profiler& p) {
        return "moesaic.Profile(calls=" + std::to_string(p.counter(Counter::Calls)) + ")";
      });
}

}  // namespace moesaic::python
