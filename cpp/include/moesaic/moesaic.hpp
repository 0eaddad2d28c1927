#pragma once

/// The whole C++ library, in reading order: no header needs one that stands below it.

// clang-format off
// What everything speaks of.
#include "moesaic/error.hpp"
#include "moesaic/leaf_mutex.hpp"
#include "moesaic/names.hpp"
#include "moesaic/operands.hpp"
#include "moesaic/operations.hpp"
#include "moesaic/types.hpp"
#include "moesaic/quant.hpp"

// Which expert gets which token.
#include "moesaic/routing.hpp"
#include "moesaic/plan.hpp"

// A layer: its facts, the file that they stand in, its weights.
#include "moesaic/config.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/layer.hpp"

// What a call runs on.
#include "moesaic/tuning.hpp"
#include "moesaic/topology.hpp"
#include "moesaic/thread_pool.hpp"
#include "moesaic/profile.hpp"
#include "moesaic/backend_facts.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"
#include "moesaic/workspace.hpp"

// The call.
#include "moesaic/forward.hpp"

// Beside it: matrices that are no experts, ending a call, edited and quantised layers, INT4
// checkpoints, experts in slow memory, the limits of the machine.
#include "moesaic/quant_matrix.hpp"
#include "moesaic/interrupt.hpp"
#include "moesaic/edit.hpp"
#include "moesaic/quantize.hpp"
#include "moesaic/quantize_stack.hpp"
#include "moesaic/marlin_stack.hpp"
#include "moesaic/expert_pool.hpp"
#include "moesaic/offload.hpp"
#include "moesaic/measure.hpp"
// clang-format on
