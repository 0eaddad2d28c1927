#pragma once

/// The whole C++ library, in reading order.

#include "moesaic/backend.hpp"
#include "moesaic/config.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"
#include "moesaic/expert_pool.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/layer.hpp"
#include "moesaic/marlin_stack.hpp"
#include "moesaic/names.hpp"
#include "moesaic/offload.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/profile.hpp"
#include "moesaic/quant.hpp"
#include "moesaic/routing.hpp"
#include "moesaic/thread_pool.hpp"
#include "moesaic/tuning.hpp"
#include "moesaic/types.hpp"
#include "moesaic/workspace.hpp"
