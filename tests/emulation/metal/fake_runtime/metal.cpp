// The classes of Metal that the host code uses, with the rules that the real ones enforce.

#include <objc/runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "fake_metal.hpp"
#include "objects.hpp"

namespace fake_metal {
namespace {

constexpr std::size_t kMaxInlineBytes = 4096;
constexpr unsigned long kMaxThreads = 1024;
constexpr unsigned long kMaxBuffers = 31;

struct Size {
  unsigned long width, height, depth;
};

struct String : Object {
  explicit String(std::string s) : Object("NSString"), text(std::move(s)) {}
  std::string text;
};

struct Error : Object {
  Error(long c, std::string t) : Object("NSError"), code(c), text(std::move(t)) {}
  long code;
  std::string text;
};

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

struct CommandBuffer : Object {
  CommandBuffer() : Object("MTLCommandBuffer") {}
  ~CommandBuffer() override {
    must(!encoder_open, "a command buffer goes while its encoder is open");
    if (error != nullptr) release(error);
  }
  std::vector<Command> commands;
  bool encoder_open = false, committed = false;
  unsigned long status = 0;  // MTLCommandBufferStatusNotEnqueued
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
    ++counters().indirect;
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
  ++counters().dispatches;
}

/// Committed and not yet run, in order.
std::mutex pending_mutex;
std::vector<Held<CommandBuffer>> pending;

/// Runs what was committed up to `last`, as the device would.
void run_until(CommandBuffer* last) {
  const std::lock_guard lock(pending_mutex);
  while (last->status < 4 && !pending.empty()) {
    const Held<CommandBuffer> next = pending.front();
    pending.erase(pending.begin());
    if (const long code = faults().command_error; code != 0) {
      next->error = new Error(code, "a fault asked for by the test");
      next->status = 5;  // MTLCommandBufferStatusError
    } else {
      for (const Command& command : next->commands) run(command);
      next->status = 4;  // MTLCommandBufferStatusCompleted
    }
    next->commands.clear();
  }
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
  method("NSError", "code", [](Error* self, SEL) { return self->code; });
  method("NSError", "localizedDescription",
         [](Error* self, SEL) -> Object* { return autoreleased(new String(self->text)); });
  return true;
}

bool add_device() {
  method("MTLDevice", "name",
         [](Object*, SEL) -> Object* { return autoreleased(new String("Fake GPU")); });
  method("MTLDevice", "supportsFamily:", [](Object*, SEL, long) { return !faults().old_device; });
  method("MTLDevice", "maxBufferLength", [](Object*, SEL) { return 1UL << 32; });
  method("MTLDevice", "newCommandQueue", [](Object*, SEL) -> Object* { return new Queue; });
  method("MTLDevice", "newBufferWithLength:options:",
         [](Object*, SEL, unsigned long length, unsigned long) -> Object* {
           must(length > 0, "a buffer of no bytes");
           return faults().no_memory ? nullptr : new Buffer(length);
         });
  method("MTLDevice", "newBufferWithBytesNoCopy:length:options:deallocator:",
         [](Object*, SEL, void* pages, unsigned long length, unsigned long, void*) -> Object* {
           must(reinterpret_cast<std::uintptr_t>(pages) % page() == 0 && length % page() == 0,
                "a buffer without a copy needs whole pages");
           if (faults().no_mapping) return nullptr;
           counters().mapped_bytes += static_cast<long>(length);
           return new Buffer(pages, length);
         });
  method("MTLBuffer", "contents", [](Buffer* self, SEL) -> void* { return self->contents; });
  method("MTLBuffer", "length", [](Buffer* self, SEL) { return self->length; });
  return true;
}

bool add_library() {
  method("+MTLCompileOptions", "alloc", [](Object*, SEL) -> Object* { return new Options; });
  method("MTLCompileOptions", "init", [](Object* self, SEL) { return self; });
  method("MTLCompileOptions",
         "setFastMathEnabled:", [](Options* self, SEL, bool on) { self->fast_math = on; });
  method("MTLCompileOptions", "setLanguageVersion:", [](Object*, SEL, unsigned long) {});
  method("MTLDevice", "newLibraryWithSource:options:error:",
         [](Object*, SEL, String* source, Options* options, Object** error) -> Object* {
           must(options != nullptr && !options->fast_math,
                "fast math assumes that there are no NaNs");
           must(source->text.find("kernel void") != std::string::npos, "source without kernels");
           must(source->text.find("#include \"") == std::string::npos,
                "the driver finds no files of ours");
           ++counters().libraries;
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
           ++counters().pipelines;
           return new Pipeline(*function);
         });
  method("MTLComputePipelineState", "threadExecutionWidth", [](Object*, SEL) { return 32UL; });
  method("MTLComputePipelineState", "maxTotalThreadsPerThreadgroup",
         [](Object*, SEL) { return kMaxThreads; });
  return true;
}

bool add_commands() {
  method("MTLCommandQueue", "commandBuffer",
         [](Object*, SEL) -> Object* { return autoreleased(new CommandBuffer); });
  method("MTLCommandBuffer", "computeCommandEncoder", [](CommandBuffer* self, SEL) -> Object* {
    must(!self->encoder_open && !self->committed, "one encoder at a time, before the commit");
    self->encoder_open = true;
    return autoreleased(new Encoder(self));
  });
  method("MTLCommandBuffer", "commit", [](CommandBuffer* self, SEL) {
    must(!self->encoder_open, "a commit with an open encoder");
    must(!self->committed, "a second commit");
    self->committed = true;
    self->status = 2;  // MTLCommandBufferStatusCommitted
    ++counters().command_buffers;
    const std::lock_guard lock(pending_mutex);
    pending.emplace_back(self);
  });
  method("MTLCommandBuffer", "waitUntilCompleted", [](CommandBuffer* self, SEL) {
    must(self->committed, "a wait for what was not committed");
    run_until(self);
  });
  method("MTLCommandBuffer", "status", [](CommandBuffer* self, SEL) { return self->status; });
  method("MTLCommandBuffer", "error",
         [](CommandBuffer* self, SEL) -> Object* { return self->error; });
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

Counters& counters() {
  static Counters c;
  return c;
}

}  // namespace fake_metal

extern "C" void* MTLCreateSystemDefaultDevice() {
  if (fake_metal::faults().no_device) return nullptr;
  return static_cast<fake_metal::Object*>(new fake_metal::Object("MTLDevice"));
}
