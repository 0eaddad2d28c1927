#pragma once

/// metal-cpp as this backend uses it: symbols stay inside the library.

#define METALCPP_SYMBOL_VISIBILITY_HIDDEN
#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>
