#pragma once

/// Every way between code without the GIL and Python.
///
/// A process may end while other threads are inside a call. Python up to 3.13 ends such a thread
/// where it next asks for the GIL, by unwinding frames whose destructors need the GIL themselves.
/// What is here parks the thread instead, as Python 3.14 does: it sleeps until the process is gone.

#include <optional>

#include "bindings.hpp"
#include "moesaic/interrupt.hpp"

namespace moesaic::python {

/// Holds the GIL on any thread while it lives. Parks the thread when Python is finalising.
class HeldGil {
 public:
  HeldGil();
  ~HeldGil();
  HeldGil(const HeldGil&) = delete;
  HeldGil& operator=(const HeldGil&) = delete;

 private:
  PyGILState_STATE state_;
};

/// Gives the GIL away while it lives. Parks the thread when Python is finalising.
class ReleasedGil {
 public:
  ReleasedGil();
  ~ReleasedGil();
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* thread_;
};

/// Gives the GIL away for work that may take long: a signal whose Python handler raises, such as Ctrl-C, ends
/// it between two units of work, and the call raises what the handler raised. For work that holds
/// no lock which a thread with the GIL may wait for.
class InterruptibleRelease {
 public:
  InterruptibleRelease();

 private:
  ReleasedGil released_;
  Interrupt interrupt_;
};

/// Puts back what a handler raised in the last InterruptibleRelease of this thread, if anything.
bool restore_interrupt();

/// Calls Python code that may run long. Unlike a call through pybind11 it leaves no frame to unwind
/// when the thread is to end in there.
py::object call_python(const py::object& callable, const py::tuple& args,
                       const py::dict& kwargs = {});

}  // namespace moesaic::python
