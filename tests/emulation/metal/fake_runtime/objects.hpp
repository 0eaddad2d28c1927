#pragma once

/// Objective-C objects as the fake runtime has them: a class name, a reference count, and methods
/// found by class and selector. An unknown selector ends the program with its name.

#include <atomic>
#include <string>

namespace fake_metal {

struct Object {
  explicit Object(const char* name);
  virtual ~Object();
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  const char* class_name;
  std::atomic<long> references{1};
};

/// Ends the program: the host code broke a rule of Metal.
[[noreturn]] void broken(const std::string& rule);
inline void must(bool ok, const char* rule) {
  if (!ok) broken(rule);
}

void retain(Object* object);
void release(Object* object);
/// Released when the innermost pool of this thread goes; every such object needs a pool.
void add_to_pool(Object* object);
/// For messages whose real answers may leave temporary objects behind.
void need_pool();
template <class T>
T* autoreleased(T* object) {
  add_to_pool(object);
  return object;
}

/// Adds a method. `function` is a captureless lambda (self, SEL, arguments...). Classes begin with
/// "+"; class "*" means every class.
void add_method(const char* class_name, const char* selector, void* function);
template <class Lambda>
void method(const char* class_name, const char* selector, Lambda lambda) {
  add_method(class_name, selector, reinterpret_cast<void*>(+lambda));
}

/// Objects that exist now; for leak checks.
long live_objects();

}  // namespace fake_metal
