// The classes of Metal that the host code uses, with the rules that the real ones enforce.

#include <objc/runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "fake_metal.hpp"
#include "objects.hpp"

namespace fake_metal {
namespace {

constexpr std::size_t kMaxInlineBytes = 4096;
constexpr unsigned long kMaxThreads = 1024;
constexpr unsigned long kMaxBuffers = 31;

struct Version {
  long major, minor, patch;
};

struct Size {
  unsigned long width, height, depth;
};

struct String : Object {
  explicit String(std::string s) : Object("NSString"), text(std::move(s)) {}
  std::string text;
};

struct Array : Object {
  Array() : Object("NSArray") {}
  ~Array() override {
    for (Object* object : objects) release(object);
  }
  std::vector<Object*> objects;
};

struct Error : Object {
  Error(long c, std::string t) : Object("NSError"), code(c), text(std::move(t)) {}
  long code;
  std::string text;
};

void count(long Counters::* what, long by = 1) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  counters().*what += by;
}

std::size_t page() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

struct Buffer : Object {
  /// Memory of its own, poisoned, that ends at a page nobody may touch.
  explicit Buffer(std::size_t bytes) : Object("MTLBuffer"), length(bytes) {
    const std::size_t used = (bytes + 63) / 64 * 64;
    mapped = (used + page() - 1) / page() * page() + page();
    base = static_cast<std::byte*>(
        ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    must(base != MAP_FAILED, "the machine has no memory left");
    contents = base + mapped - page() - used;
    must(::mprotect(base + mapped - page(), page(), PROT_NONE) == 0, "mprotect");
    std::memset(base, 0xFF, mapped - page());
  }
  Buffer(void* pages, std::size_t bytes)
      : Object("MTLBuffer"), contents(static_cast<std::byte*>(pages)), length(bytes) {}
  ~Buffer() override {
    if (base != nullptr) ::munmap(base, mapped);
  }
  std::byte* base = nullptr;
  std::byte* contents = nullptr;
  std::size_t length, mapped = 0;
};

struct Options : Object {
  Options() : Object("MTLCompileOptions") {}
  bool fast_math = true;
  bool precise_functions = true;  // what setFastMathEnabled(false) brings
};

struct ResidencySet : Object {
  ResidencySet() : Object("MTLResidencySet") {}
  long added = 0, committed = 0;
};

struct ConstantValues : Object {
  ConstantValues() : Object("MTLFunctionConstantValues") {}
  std::map<unsigned, int> values;
};

struct Function : Object {
  Function(const Kernel* k, std::map<unsigned, int> c)
      : Object("MTLFunction"), kernel(k), constants(std::move(c)) {}
  const Kernel* kernel;
  std::map<unsigned, int> constants;
};

struct Pipeline : Object {
  explicit Pipeline(const Function& f)
      : Object("MTLComputePipelineState"), kernel(f.kernel), constants(f.constants) {}
  const Kernel* kernel;
  std::map<unsigned, int> constants;
};

template <class T>
class Held {
 public:
  explicit Held(T* object) : object_(object) { retain(object); }
  Held(const Held& other) : Held(other.object_) {}
  Held& operator=(const Held& other) {
    retain(other.object_);
    release(object_);
    object_ = other.object_;
    return *this;
  }
  ~Held() { release(object_); }
  T* operator->() const { return object_; }

 private:
  T* object_;
};

struct Bound {
  Held<Buffer> buffer;
  std::size_t offset;
};

struct Command {
  Held<Pipeline> pipeline;
  std::vector<std::byte> arguments;
  std::map<unsigned long, Bound> buffers;
  Size groups;
  unsigned long threads;
  bool indirect;
  Bound grid;
};

using Clock = std::chrono::steady_clock;

/// What a queue shares with its command buffers, which may outlive it.
struct QueueState {
  std::mutex mutex;
  std::condition_variable changed;
  long open = 0;     ///< command buffers that exist and have not finished
  long waiters = 0;  ///< threads that wait for one of them
};

struct Queue;

struct CommandBuffer : Object {
  CommandBuffer(Queue* q, std::shared_ptr<QueueState> s)
      : Object("MTLCommandBuffer"), queue(q), state(std::move(s)) {}
  ~CommandBuffer() override {
    must(!encoder_open, "a command buffer goes while its encoder is open");
    if (error != nullptr) release(error);
    if (committed) return;
    const std::lock_guard lock(state->mutex);
    --state->open;
    state->changed.notify_all();
  }
  Queue* const queue;  ///< alive until the commit
  const std::shared_ptr<QueueState> state;
  std::vector<Command> commands;
  bool encoder_open = false, committed = false;
  long fails_with = 0;
  Clock::time_point starts, ends;  // not before
  // Under the queue's mutex:
  unsigned long status = 0;  // MTLCommandBufferStatusNotEnqueued
  Clock::time_point began, ended;
  Error* error = nullptr;
};

struct Encoder : Object {
  explicit Encoder(CommandBuffer* c) : Object("MTLComputeCommandEncoder"), commands(c) {}
  ~Encoder() override { must(ended, "an encoder goes before endEncoding"); }
  void record(Size groups, Size threads, Buffer* grid, std::size_t grid_offset);
  Held<CommandBuffer> commands;
  Pipeline* pipeline = nullptr;
  std::vector<std::byte> arguments;
  std::map<unsigned long, Bound> buffers;
  bool ended = false;
};

struct Queue : Object {
  Queue() : Object("MTLCommandQueue") {}
  ~Queue() override {
    {
      const std::lock_guard lock(state->mutex);
      ending = true;
      state->changed.notify_all();
    }
    if (device.joinable()) device.join();
  }
  CommandBuffer* command_buffer();
  void commit(CommandBuffer* commands);
  void work();

  const std::shared_ptr<QueueState> state = std::make_shared<QueueState>();
  // Under its mutex:
  std::deque<Held<CommandBuffer>> pending;
  bool ending = false;
  std::thread device;  // begins with the first commit, so that death tests can fork before
};

void Encoder::record(Size groups, Size threads, Buffer* grid, std::size_t grid_offset) {
  must(!ended, "a dispatch after endEncoding");
  must(pipeline != nullptr, "a dispatch without a pipeline");
  must(threads.width * threads.height * threads.depth <= kMaxThreads,
       "more than 1024 threads per threadgroup");
  must(threads.width % 32 == 0 && threads.height == 1 && threads.depth == 1,
       "threadgroups of whole simdgroups in one dimension");
  must(grid != nullptr || (groups.width > 0 && groups.height > 0 && groups.depth > 0),
       "a grid without threadgroups");
  const Kernel& kernel = *pipeline->kernel;
  must(arguments.size() == kernel.argument_bytes, "arguments of another size than the kernel's");
  for (unsigned long i = 1; i <= kernel.alignments.size(); ++i) {
    const auto bound = buffers.find(i);
    if (bound == buffers.end()) broken("buffer " + std::to_string(i) + " is not set");
    must(bound->second.offset % kernel.alignments[i - 1] == 0,
         "an offset that is not aligned to the buffer's type");
  }
  if (grid != nullptr) {
    must(grid_offset % 4 == 0 && grid_offset + 12 <= grid->length,
         "an indirect grid outside its buffer");
  }
  Buffer* const any = grid != nullptr ? grid : buffers.begin()->second.buffer.operator->();
  commands->commands.push_back({Held(pipeline), arguments, buffers, groups, threads.width,
                                grid != nullptr, Bound{Held(any), grid_offset}});
}

void run(const Command& command) {
  std::uint32_t groups[3] = {static_cast<std::uint32_t>(command.groups.width),
                             static_cast<std::uint32_t>(command.groups.height),
                             static_cast<std::uint32_t>(command.groups.depth)};
  if (command.indirect) {
    std::memcpy(groups, command.grid.buffer->contents + command.grid.offset, sizeof groups);
    must(std::size_t{groups[0]} * groups[1] * groups[2] < 1u << 20, "an indirect grid of garbage");
    count(&Counters::indirect);
  }
  std::vector<void*> buffers;
  for (const auto& [index, bound] : command.buffers) {
    buffers.push_back(bound.buffer->contents + bound.offset);
  }
  for (const auto& [index, value] : command.pipeline->constants) {
    set_function_constant(index, value);
  }
  const Kernel& kernel = *command.pipeline->kernel;
  kernel.run(kernel, command.arguments.data(), buffers.data(), groups,
             static_cast<std::uint32_t>(command.threads));
  count(&Counters::dispatches);
}

/// The one GPU that all queues share.
std::mutex& gpu() {
  static std::mutex m;
  return m;
}

void finish(CommandBuffer& commands) {
  const Clock::time_point began = Clock::now();
  std::optional<long> code;
  if (commands.fails_with != 0) {
    code = commands.fails_with;
  } else {
    const std::lock_guard lock(gpu());
    try {
      for (const Command& command : commands.commands) run(command);
    } catch (const std::exception& fault) {
      broken(std::string("a kernel failed: ") + fault.what());
    }
  }
  std::this_thread::sleep_until(commands.ends);
  commands.commands.clear();
  const std::lock_guard lock(commands.state->mutex);
  commands.began = began;
  commands.ended = Clock::now();
  if (code) commands.error = new Error(*code, "a fault asked for by the test");
  commands.status = code ? 5 : 4;  // MTLCommandBufferStatusError, MTLCommandBufferStatusCompleted
  --commands.state->open;
  commands.state->changed.notify_all();
}

/// Runs what was committed, in order, until the queue ends.
void Queue::work() {
  std::unique_lock lock(state->mutex);
  for (;;) {
    state->changed.wait(lock, [&] { return ending || !pending.empty(); });
    if (pending.empty()) return;
    const Held<CommandBuffer> next = pending.front();
    pending.pop_front();
    state->changed.wait_until(lock, next->starts, [&] { return ending || state->waiters > 0; });
    lock.unlock();
    finish(*next.operator->());
    lock.lock();
  }
}

CommandBuffer* Queue::command_buffer() {
  std::unique_lock lock(state->mutex);
  const bool free =
      state->changed.wait_for(lock, pace().patience, [&] { return state->open < kMaxOpenBuffers; });
  must(free, "64 command buffers are open, and none of them finishes");
  ++state->open;
  return new CommandBuffer(this, state);
}

void Queue::commit(CommandBuffer* commands) {
  const std::lock_guard lock(state->mutex);
  commands->status = 2;  // MTLCommandBufferStatusCommitted
  commands->fails_with = faults().command_error;
  commands->starts = Clock::now() + pace().idle;
  commands->ends = Clock::now() + pace().takes;
  pending.emplace_back(commands);
  if (!device.joinable()) device = std::thread([this] { work(); });
  state->changed.notify_all();
}

void give_error(Object** out, long code, const char* text) {
  if (out != nullptr) *out = autoreleased(new Error(code, text));
}

bool add_foundation() {
  method("+NSString", "stringWithCString:encoding:",
         [](Object*, SEL, const char* text, unsigned long) -> Object* {
           return autoreleased(new String(text));
         });
  method("NSString", "UTF8String", [](String* self, SEL) { return self->text.c_str(); });
  method("+NSProcessInfo", "processInfo",
         [](Object*, SEL) -> Object* { return autoreleased(new Object("NSProcessInfo")); });
  method("NSProcessInfo", "isOperatingSystemAtLeastVersion:", [](Object*, SEL, Version version) {
    return version.major <= (faults().old_system ? 14 : 15);
  });
  method("NSArray", "count", [](Array* self, SEL) { return self->objects.size(); });
  method("NSArray", "objectAtIndex:", [](Array* self, SEL, unsigned long index) {
    return self->objects.at(index);
  });
  method("NSError", "code", [](Error* self, SEL) { return self->code; });
  method("NSError", "localizedDescription",
         [](Error* self, SEL) -> Object* { return autoreleased(new String(self->text)); });
  return true;
}

bool add_device() {
  method("MTLDevice", "name",
         [](Object*, SEL) -> Object* { return autoreleased(new String("Fake GPU")); });
  method("MTLDevice", "supportsFamily:", [](Object*, SEL, long) { return !faults().old_device; });
  method("MTLDevice", "maxBufferLength", [](Object*, SEL) { return faults().max_buffer; });
  method("MTLDevice", "recommendedMaxWorkingSetSize", [](Object*, SEL) { return 3UL << 30; });
  method("MTLDevice", "newCommandQueue", [](Object*, SEL) -> Object* {
    need_pool();
    return new Queue;
  });
  method("MTLDevice", "newBufferWithLength:options:",
         [](Object*, SEL, unsigned long length, unsigned long) -> Object* {
           need_pool();
           must(length > 0, "a buffer of no bytes");
           const bool fits = length <= faults().max_buffer && !faults().no_memory;
           return fits ? new Buffer(length) : nullptr;
         });
  method("MTLDevice", "newBufferWithBytesNoCopy:length:options:deallocator:",
         [](Object*, SEL, void* pages, unsigned long length, unsigned long, void*) -> Object* {
           need_pool();
           must(reinterpret_cast<std::uintptr_t>(pages) % page() == 0 && length % page() == 0,
                "a buffer without a copy needs whole pages");
           if (faults().no_mapping) return nullptr;
           count(&Counters::mapped_bytes, static_cast<long>(length));
           return new Buffer(pages, length);
         });
  method("+MTLResidencySetDescriptor", "alloc", [](Object*, SEL) -> Object* {
    must(!faults().old_system, "residency sets came with macOS 15");
    return new Object("MTLResidencySetDescriptor");
  });
  method("MTLResidencySetDescriptor", "init", [](Object* self, SEL) { return self; });
  method("MTLDevice", "newResidencySetWithDescriptor:error:",
         [](Object*, SEL, Object* descriptor, Object**) -> Object* {
           need_pool();
           must(descriptor != nullptr, "a residency set needs a descriptor");
           return new ResidencySet;
         });
  method("MTLResidencySet", "addAllocation:", [](ResidencySet* self, SEL, Buffer* buffer) {
    must(buffer != nullptr, "residency of no buffer");
    ++self->added;
  });
  method("MTLResidencySet", "commit",
         [](ResidencySet* self, SEL) { self->committed = self->added; });
  method("MTLResidencySet", "requestResidency", [](ResidencySet* self, SEL) {
    must(self->added > 0 && self->committed == self->added, "residency before the commit");
    count(&Counters::residency_requests);
  });
  method("MTLResidencySet", "endResidency",
         [](ResidencySet*, SEL) { count(&Counters::residency_ends); });
  method("MTLBuffer", "contents", [](Buffer* self, SEL) -> void* { return self->contents; });
  method("MTLBuffer", "length", [](Buffer* self, SEL) { return self->length; });
  return true;
}

bool add_library() {
  method("+MTLCompileOptions", "alloc", [](Object*, SEL) -> Object* { return new Options; });
  method("MTLCompileOptions", "init", [](Object* self, SEL) { return self; });
  method("MTLCompileOptions",
         "setFastMathEnabled:", [](Options* self, SEL, bool on) { self->fast_math = on; });
  method("MTLCompileOptions", "setMathMode:", [](Options* self, SEL, long mode) {
    must(!faults().old_system, "setMathMode: came with macOS 15");
    self->fast_math = mode != 0;  // MTLMathModeSafe
    self->precise_functions = false;
  });
  method("MTLCompileOptions",
         "setMathFloatingPointFunctions:", [](Options* self, SEL, long functions) {
           must(!faults().old_system, "setMathFloatingPointFunctions: came with macOS 15");
           self->precise_functions = functions == 1;
         });
  method("MTLCompileOptions", "setLanguageVersion:", [](Object*, SEL, unsigned long) {});
  method("MTLDevice", "newLibraryWithSource:options:error:",
         [](Object*, SEL, String* source, Options* options, Object** error) -> Object* {
           must(options != nullptr && !options->fast_math,
                "fast math assumes that there are no NaNs");
           must(options->precise_functions, "functions that are fast instead of precise");
           must(source->text.find("kernel void") != std::string::npos, "source without kernels");
           must(source->text.find("#include \"") == std::string::npos,
                "the driver finds no files of ours");
           count(&Counters::libraries);
           if (!faults().does_not_compile) return new Object("MTLLibrary");
           give_error(error, 3, "program_source:1:1: error: asked for by the test");
           return nullptr;
         });
  method("+MTLFunctionConstantValues", "alloc",
         [](Object*, SEL) -> Object* { return new ConstantValues; });
  method("MTLFunctionConstantValues", "init", [](Object* self, SEL) { return self; });
  method("MTLFunctionConstantValues", "setConstantValue:type:atIndex:",
         [](ConstantValues* self, SEL, const void* value, unsigned long type, unsigned long index) {
           must(type == 29, "function constants are of type int");  // MTLDataTypeInt
           std::memcpy(&self->values[static_cast<unsigned>(index)], value, sizeof(int));
         });
  method("MTLLibrary", "newFunctionWithName:constantValues:error:",
         [](Object*, SEL, String* name, ConstantValues* values, Object** error) -> Object* {
           const Kernel* const kernel = find_kernel(name->text);
           if (kernel != nullptr) return new Function(kernel, values->values);
           give_error(error, 2, "no such function");
           return nullptr;
         });
  method("MTLDevice", "newComputePipelineStateWithFunction:error:",
         [](Object*, SEL, Function* function, Object**) -> Object* {
           count(&Counters::pipelines);
           return new Pipeline(*function);
         });
  method("MTLComputePipelineState", "threadExecutionWidth", [](Object*, SEL) { return 32UL; });
  method("MTLComputePipelineState", "maxTotalThreadsPerThreadgroup",
         [](Object*, SEL) { return kMaxThreads; });
  return true;
}

bool add_commands() {
  method("MTLCommandQueue", "commandBuffer",
         [](Queue* self, SEL) -> Object* { return autoreleased(self->command_buffer()); });
  method("MTLCommandBuffer", "computeCommandEncoder", [](CommandBuffer* self, SEL) -> Object* {
    must(!self->encoder_open && !self->committed, "one encoder at a time, before the commit");
    self->encoder_open = true;
    return autoreleased(new Encoder(self));
  });
  method("MTLCommandBuffer", "commit", [](CommandBuffer* self, SEL) {
    need_pool();
    must(!self->encoder_open, "a commit with an open encoder");
    must(!self->committed, "a second commit");
    self->committed = true;
    count(&Counters::command_buffers);
    self->queue->commit(self);
  });
  method("MTLCommandBuffer", "waitUntilCompleted", [](CommandBuffer* self, SEL) {
    need_pool();
    must(self->committed, "a wait for what was not committed");
    std::unique_lock lock(self->state->mutex);
    ++self->state->waiters;
    self->state->changed.notify_all();
    self->state->changed.wait(lock, [&] { return self->status >= 4; });
    --self->state->waiters;
  });
  method("MTLCommandBuffer", "status", [](CommandBuffer* self, SEL) {
    const std::lock_guard lock(self->state->mutex);
    return self->status;
  });
  method("MTLCommandBuffer", "GPUStartTime", [](CommandBuffer* self, SEL) {
    const std::lock_guard lock(self->state->mutex);
    return std::chrono::duration<double>(self->began.time_since_epoch()).count();
  });
  method("MTLCommandBuffer", "GPUEndTime", [](CommandBuffer* self, SEL) {
    const std::lock_guard lock(self->state->mutex);
    return std::chrono::duration<double>(self->ended.time_since_epoch()).count();
  });
  method("MTLCommandBuffer", "error", [](CommandBuffer* self, SEL) -> Object* {
    const std::lock_guard lock(self->state->mutex);
    return self->error;
  });
  return true;
}

bool add_encoder() {
  constexpr const char* kClass = "MTLComputeCommandEncoder";
  method(kClass, "setComputePipelineState:", [](Encoder* self, SEL, Pipeline* pipeline) {
    self->pipeline = pipeline;
  });
  method(kClass, "setBytes:length:atIndex:",
         [](Encoder* self, SEL, const std::byte* bytes, unsigned long length, unsigned long index) {
           must(length <= kMaxInlineBytes, "more than 4096 inline bytes");
           must(index == 0, "arguments are buffer 0");
           self->arguments.assign(bytes, bytes + length);
         });
  method(kClass, "setBuffer:offset:atIndex:",
         [](Encoder* self, SEL, Buffer* buffer, unsigned long offset, unsigned long index) {
           must(buffer != nullptr && offset < buffer->length, "a binding outside its buffer");
           must(index > 0 && index < kMaxBuffers, "buffer indices are 1 to 30");
           self->buffers.insert_or_assign(index, Bound{Held(buffer), offset});
         });
  method(kClass, "dispatchThreadgroups:threadsPerThreadgroup:",
         [](Encoder* self, SEL, Size groups, Size threads) {
           self->record(groups, threads, nullptr, 0);
         });
  method(kClass,
         "dispatchThreadgroupsWithIndirectBuffer:indirectBufferOffset:threadsPerThreadgroup:",
         [](Encoder* self, SEL, Buffer* grid, unsigned long offset, Size threads) {
           must(grid != nullptr, "an indirect dispatch without a grid");
           self->record({}, threads, grid, offset);
         });
  method(kClass, "endEncoding", [](Encoder* self, SEL) {
    must(!self->ended, "endEncoding twice");
    self->ended = true;
    self->commands->encoder_open = false;
  });
  return true;
}

[[maybe_unused]] const bool added =
    add_foundation() && add_device() && add_library() && add_commands() && add_encoder();

}  // namespace

Faults& faults() {
  static Faults f;
  return f;
}

Pace& pace() {
  static Pace p;
  return p;
}

Counters& counters() {
  static Counters c;
  return c;
}

}  // namespace fake_metal

extern "C" {

void* MTLCreateSystemDefaultDevice() {
  const fake_metal::Faults& faults = fake_metal::faults();
  if (faults.no_device || faults.no_default_device) return nullptr;
  return static_cast<fake_metal::Object*>(new fake_metal::Object("MTLDevice"));
}

void* MTLCopyAllDevices() {
  auto* const all = new fake_metal::Array;
  if (!fake_metal::faults().no_device) all->objects.push_back(new fake_metal::Object("MTLDevice"));
  return static_cast<fake_metal::Object*>(all);
}
}
