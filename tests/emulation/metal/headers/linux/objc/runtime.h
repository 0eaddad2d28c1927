#pragma once

// The part of the Objective-C runtime that metal-cpp calls; fake_runtime/objects.cpp has it for Linux.

extern "C" {
typedef struct objc_selector* SEL;
struct objc_object {
  void* isa;
};
typedef struct objc_object* id;
typedef struct objc_class* Class;
typedef void (*IMP)();
Class objc_lookUpClass(const char* name);
void* objc_getProtocol(const char* name);
SEL sel_registerName(const char* name);
void objc_msgSend();
void objc_msgSend_fpret();
void objc_msgSend_stret();
}
