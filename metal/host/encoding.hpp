#pragma once

/// One operation being recorded: arguments and addresses in, dispatches out.

#include <cstddef>
#include <exception>
#include <initializer_list>
#include <span>
#include <vector>

#include "metal/host/errors.hpp"
#include "metal/host/queue.hpp"

namespace moesaic::metal {

/// What operations are recorded with. `nothing` is bound where an optional array is absent.
struct Recorder {
  explicit Recorder(MTL::Device* device)
      : memory(device), pipelines(device), queue(device), nothing(memory.allocate(1)) {}

  Memory memory;
  Pipelines pipelines;
  Queue queue;
  void* nothing;
};

class Encoding {
 public:
  Encoding(Recorder& recorder, Context& context, const char* operation)
      : recorder_(recorder),
        work_(recorder.queue.work_of(context)),
        operation_(operation),
        exceptions_(std::uncaught_exceptions()) {}
  /// An exception leaves no half of a call behind.
  ~Encoding() {
    if (std::uncaught_exceptions() > exceptions_) recorder_.queue.abandon(work_);
  }
  Encoding(const Encoding&) = delete;
  Encoding& operator=(const Encoding&) = delete;

  /// Where kernels find an array in Metal memory; null: nothing.
  BufferSlice at(const void* array) const {
    return recorder_.memory.find(array != nullptr ? array : recorder_.nothing, operation_);
  }
  /// Where kernels find an array that may also lie in memory of the host; then it is copied.
  BufferSlice copied(const void* array, std::size_t bytes) {
    if (array == nullptr || bytes == 0 || recorder_.memory.holds(array, bytes)) return at(array);
    copies_.push_back(recorder_.memory.copy_of(array, bytes));
    return {copies_.back().get(), 0};
  }

  template <class Arguments>
  void run(const DispatchShape& shape, const Arguments& arguments,
           std::initializer_list<BufferSlice> buffers, const BufferSlice* grid = nullptr) {
    if (shape.empty()) return;
    recorder_.queue.dispatch(work_, recorder_.pipelines.get(shape.kernel, shape.constants), shape,
                             std::as_bytes(std::span(&arguments, 1)), buffers, grid);
  }

 private:
  Recorder& recorder_;
  Work& work_;
  const char* operation_;
  int exceptions_;
  AutoreleaseScope scope_;
  std::vector<NS::SharedPtr<MTL::Buffer>> copies_;  // the command buffer retains them too
};

}  // namespace moesaic::metal
