#pragma once

/// Arrays of the host in a call on a device that shares the host's memory.

#include <memory>
#include <vector>

#include "moesaic/context.hpp"
#include "moesaic/types.hpp"
#include "views.hpp"

namespace moesaic::python {

/// Makes the arrays of one call known to its backend: in place where the backend can use them there
/// (on Metal: from a page's begin on), else in dense copies. On the CPU, and on a GPU with memory of
/// its own, whose arrays are there already, it gives the views back as they came. The arrays must
/// outlive it; needs no GIL.
class HostArrays {
 public:
  explicit HostArrays(Context& context);
  /// Waits for the device where finish() has not: launches may use the arrays until then.
  ~HostArrays();
  HostArrays(const HostArrays&) = delete;
  HostArrays& operator=(const HostArrays&) = delete;

  /// Whether there is anything to do.
  bool needed() const { return shares_; }
  /// What launches read. Errors: OutOfMemoryError.
  ConstTensorView read(const ConstTensorView& view);
  /// What launches write, or add to: it begins with the values of `view`.
  TensorView write(const TensorView& view);
  /// Waits for the launches and brings home what was written to copies. Errors: those of the device.
  void finish();

 private:
  struct Copy {
    TensorView there, home;
  };
  TensorView place(const TensorView& view, bool written);

  Context& context_;
  bool shares_;
  bool finished_ = false;
  std::vector<std::shared_ptr<const void>> held_;
  std::vector<Copy> copies_;
};

}  // namespace moesaic::python
