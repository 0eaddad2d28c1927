#include "objects.hpp"

#include <objc/runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace fake_metal {
namespace {

std::atomic<long> live{0};

/// Static constructors of metal-cpp look up classes and selectors, so all tables are made on
/// demand.
std::mutex& mutex() {
  static std::mutex m;
  return m;
}
std::map<std::pair<std::string, std::string>, void*>& methods() {
  static auto& table = *new std::map<std::pair<std::string, std::string>, void*>;
  return table;
}

struct Pool : Object {
  Pool() : Object("NSAutoreleasePool") {}
  ~Pool() override;
  std::vector<Object*> objects;
};
thread_local std::vector<Pool*> pools;

Pool::~Pool() {
  must(!pools.empty() && pools.back() == this, "autorelease pools end in reverse order");
  pools.pop_back();
  for (Object* object : objects) release(object);
}

struct ClassObject : Object {
  explicit ClassObject(std::string n) : Object(""), name("+" + std::move(n)) {
    class_name = name.c_str();
  }
  std::string name;
};

/// Ends the program for a selector that the class does not have.
void* find_method(const Object* self, const char* selector) {
  const std::lock_guard lock(mutex());
  const auto& table = methods();
  auto found = table.find({self->class_name, selector});
  if (found == table.end()) found = table.find({"*", selector});
  if (found == table.end()) {
    broken(std::string("-[") + self->class_name + " " + selector +
           "] is not known to the fake runtime");
  }
  return found->second;
}

bool add_base_methods() {
  method("*", "retain", [](Object* self, SEL) {
    retain(self);
    return self;
  });
  method("*", "release", [](Object* self, SEL) { release(self); });
  // Asked before a message that older systems lack: the fake knows all that it is sent, or ends.
  method("*", "respondsToSelector:", [](Object* self, SEL, const char* selector) {
    find_method(self, selector);
    return true;
  });
  method("+NSAutoreleasePool", "alloc", [](Object*, SEL) -> Object* { return new Pool; });
  method("NSAutoreleasePool", "init", [](Pool* self, SEL) -> Object* {
    pools.push_back(self);
    return self;
  });
  return true;
}
[[maybe_unused]] const bool added = add_base_methods();

}  // namespace

Object::Object(const char* name) : class_name(name) { ++live; }
Object::~Object() { --live; }

void broken(const std::string& rule) {
  std::fprintf(stderr, "fake Metal: %s\n", rule.c_str());
  std::abort();
}

void retain(Object* object) { ++object->references; }

void release(Object* object) {
  const long left = --object->references;
  must(left >= 0, "released too often");
  if (left == 0) delete object;
}

void need_pool() { must(!pools.empty(), "a message that needs an autorelease pool"); }

void add_to_pool(Object* object) {
  must(!pools.empty(), "an autoreleased object needs an autorelease pool");
  pools.back()->objects.push_back(object);
}

void add_method(const char* class_name, const char* selector, void* function) {
  const std::lock_guard lock(mutex());
  methods()[{class_name, selector}] = function;
}

long live_objects() { return live; }

}  // namespace fake_metal

extern "C" {

Class objc_lookUpClass(const char* name) {
  static auto& classes = *new std::map<std::string, fake_metal::ClassObject*>;
  const std::lock_guard lock(fake_metal::mutex());
  auto*& object = classes[name];
  if (object == nullptr) object = new fake_metal::ClassObject(name);
  return reinterpret_cast<Class>(static_cast<fake_metal::Object*>(object));
}

void* objc_getProtocol(const char*) { return nullptr; }

SEL sel_registerName(const char* name) {
  static auto& selectors = *new std::set<std::string>;
  const std::lock_guard lock(fake_metal::mutex());
  return reinterpret_cast<SEL>(const_cast<char*>(selectors.insert(name).first->c_str()));
}

void* fake_metal_method(fake_metal::Object* self, const char* selector) {
  // A message to null does nothing and gives null.
  if (self == nullptr) return reinterpret_cast<void*>(+[]() -> void* { return nullptr; });
  return fake_metal::find_method(self, selector);
}

/// Looks the method up and jumps to it with all registers as the caller left them.
__attribute__((naked)) void objc_msgSend() {
  asm("push %rbp\n mov %rsp, %rbp\n"
      "push %rdi\n push %rsi\n push %rdx\n push %rcx\n push %r8\n push %r9\n"
      "sub $16, %rsp\n movsd %xmm0, (%rsp)\n"
      "call fake_metal_method\n"
      "movsd (%rsp), %xmm0\n add $16, %rsp\n"
      "pop %r9\n pop %r8\n pop %rcx\n pop %rdx\n pop %rsi\n pop %rdi\n pop %rbp\n"
      "jmp *%rax\n");
}
/// A double comes back in a register of its own either way.
__attribute__((naked)) void objc_msgSend_fpret() { asm("jmp objc_msgSend\n"); }
void objc_msgSend_stret() { fake_metal::broken("a message that returns a large struct"); }

// Blocks are mentioned by headers and never used.
void* _NSConcreteStackBlock[32];
void* _NSConcreteGlobalBlock[32];
void _Block_object_assign(void*, const void*, int) {}
void _Block_object_dispose(const void*, int) {}
}
