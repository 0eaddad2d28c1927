#pragma once

#include "moesaic/backend.hpp"

namespace moesaic {
class ThreadPool;
}

namespace moesaic::cpu {

/// Backend::add_identity.
void add_identity(ThreadPool& pool, const IdentityCall& call);

}  // namespace moesaic::cpu
