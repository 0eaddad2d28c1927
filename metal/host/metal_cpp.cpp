// The one place where metal-cpp defines its selectors and classes.
#define NS_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
#include "metal/host/metal_cpp.hpp"
