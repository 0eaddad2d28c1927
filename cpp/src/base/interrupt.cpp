#include "moesaic/interrupt.hpp"

#include "moesaic/error.hpp"
#include "moesaic/expert_stack.hpp"

namespace moesaic {
namespace {
constinit thread_local Interrupt* innermost = nullptr;
}  // namespace

Interrupt::Interrupt(bool (*asked)())
    : asked_(asked), outer_(innermost), next_(std::chrono::steady_clock::now() + kInterval) {
  innermost = this;
}

Interrupt::~Interrupt() { innermost = outer_; }

Interrupt* Interrupt::current() noexcept { return innermost; }

bool Interrupt::due() {
  if (cancelled_) return true;
  const auto now = std::chrono::steady_clock::now();
  if (now < next_) return false;
  cancelled_ = asked_();
  next_ = now + kInterval;
  return cancelled_;
}

void Interrupt::check() {
  if (innermost != nullptr && innermost->due()) cancel();
}

void Interrupt::cancel() {
  throw OperationCancelled(Problem{"call", "work", {}, "interrupted before it was done", {}});
}

}  // namespace moesaic
