#include "gil.hpp"

#include <unistd.h>

namespace moesaic::python {
namespace {

[[noreturn]] void park() {
  for (;;) pause();
}

bool finalising() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

/// Calls into Python. What CPython ends a thread with unwinds like an exception, and a thread that
/// never leaves the handler is never unwound further.
template <class Call>
auto or_park(Call&& call) noexcept {
  try {
    return call();
  } catch (...) {
    park();
  }
}

/// What a signal handler raised on this thread, until the call that it ends is back.
thread_local PyObject* raised_type = nullptr;
thread_local PyObject* raised_value = nullptr;
thread_local PyObject* raised_trace = nullptr;

void forget_interrupt() {
  Py_CLEAR(raised_type);
  Py_CLEAR(raised_value);
  Py_CLEAR(raised_trace);
}

bool interrupted() {
  const HeldGil gil;
  if (or_park([] { return PyErr_CheckSignals(); }) == 0) return false;
  forget_interrupt();
  PyErr_Fetch(&raised_type, &raised_value, &raised_trace);
  return true;
}

}  // namespace

HeldGil::HeldGil() {
  if (finalising()) park();
  state_ = or_park([] { return PyGILState_Ensure(); });
}

HeldGil::~HeldGil() { PyGILState_Release(state_); }

ReleasedGil::ReleasedGil() : thread_(PyEval_SaveThread()) {}

ReleasedGil::~ReleasedGil() {
  if (finalising()) park();
  or_park([this] { PyEval_RestoreThread(thread_); });
}

InterruptibleRelease::InterruptibleRelease() : interrupt_(&interrupted) {}

bool restore_interrupt() {
  if (raised_type == nullptr) return false;
  PyErr_Restore(raised_type, raised_value, raised_trace);
  raised_type = raised_value = raised_trace = nullptr;
  return true;
}

py::object call_python(const py::object& callable, const py::tuple& args, const py::dict& kwargs) {
  PyObject* const result =
      or_park([&] { return PyObject_Call(callable.ptr(), args.ptr(), kwargs.ptr()); });
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

}  // namespace moesaic::python
