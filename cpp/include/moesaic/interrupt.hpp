#pragma once

/// How a long call is ended from outside: it asks between two units of work.

#include <chrono>

namespace moesaic {

/// While it lives, the calls of this thread ask `asked` every now and then, and end with
/// OperationCancelled once it says true; results are then incomplete. Destroy it on the thread that
/// made it, the latest first.
class Interrupt {
 public:
  /// How often a call asks.
  static constexpr auto kInterval = std::chrono::milliseconds(50);

  explicit Interrupt(bool (*asked)());
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  /// The innermost of the calling thread, or null.
  static Interrupt* current() noexcept;
  /// Asks when it is time. Once true, always true.
  bool due();
  /// For loops that use no pool, once per unit of work. Throws OperationCancelled.
  static void check();
  [[noreturn]] static void cancel();

 private:
  bool (*asked_)();
  Interrupt* outer_;
  std::chrono::steady_clock::time_point next_;
  bool cancelled_ = false;
};

}  // namespace moesaic
