#include "moesaic/workspace.hpp"

#include <algorithm>
#include <iterator>
#include <new>

#include "calls.hpp"
#include "gil.hpp"
#include "layer.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/quant_matrix.hpp"

namespace moesaic::python {

WorkspaceCache& WorkspaceCache::instance() {
  // Never destroyed: daemon threads may still call at exit.
  static auto* cache = new WorkspaceCache;
  return *cache;
}

WorkspaceCache::Kept WorkspaceCache::take(const Context& context, std::size_t bytes) {
  const Backend& backend = context.backend();
  require<CaptureError>(!backend.capturing(context), [] {
    return Problem{"workspace", "workspace", "one that outlives the graph", "none",
                   "pass workspace=Workspace.for_layer(...)"};
  });
  Kept kept;
  {
    const std::lock_guard lock(mutex_);
    auto& free = free_[key_of(context)];
    if (!free.empty()) {
      kept = std::move(free.back());
      free.pop_back();
    }
  }
  kept.needed = bytes;
  if (!kept.workspace) {
    kept.workspace = std::make_unique<Workspace>(bytes, backend);
  } else if (kept.workspace->size() < bytes) {
    kept.workspace->reserve(bytes);
  }
  return kept;
}

void WorkspaceCache::give(const Context& context, Kept kept) noexcept {
  const bool fits = kept.needed >= kept.workspace->size() / 2;
  kept.idle_calls = fits ? 0 : kept.idle_calls + 1;
  // Memory goes back behind the lock, since that may take long.
  std::vector<Kept> unused;
  try {
    const std::lock_guard lock(mutex_);
    auto& free = free_[key_of(context)];
    for (Kept& other : free) ++other.idle_calls;
    free.push_back(std::move(kept));
    const auto used = [](const Kept& one) { return one.idle_calls < kIdleCalls; };
    const auto first = std::ranges::stable_partition(free, used).begin();
    unused.assign(std::make_move_iterator(first), std::make_move_iterator(free.end()));
    free.erase(first, free.end());
  } catch (const std::bad_alloc&) {
    // Then it is not kept, or some are kept for longer.
  }
}

std::size_t WorkspaceCache::trim() {
  std::map<Key, std::vector<Kept>> free;
  {
    const std::lock_guard lock(mutex_);
    free.swap(free_);
  }
  std::size_t bytes = 0;
  for (const auto& [key, list] : free) {
    for (const Kept& kept : list) bytes += kept.workspace->size();
  }
  return bytes;
}

namespace {

std::shared_ptr<Workspace> make_workspace(const LayerRef& layer, std::int32_t top_k,
                                          std::int64_t max_tokens, const char* operation) {
  require<ShapeError>(max_tokens >= 0 && top_k >= 1, [&] {
    return Problem{operation,
                   "max_tokens and top_k",
                   "at least 0 and 1",
                   std::to_string(max_tokens) + " and " + std::to_string(top_k),
                   {}};
  });
  const Call call({}, layer.stack->device());
  return std::make_shared<Workspace>(workspace_bytes(call.context, layer, top_k, max_tokens),
                                     call.context.backend());
}

}  // namespace

void bind_workspace(py::module_& m) {
  py::class_<Workspace, std::shared_ptr<Workspace>>(m, "Workspace", py::is_final())
      .def(py::init([](std::size_t nbytes, const std::string& device) {
             return std::make_shared<Workspace>(nbytes, backend_for(parse_device(device)));
           }),
           py::arg("nbytes"), py::arg("device") = "cpu")
      .def_static(
          "for_layer",
          [](const LayerObject& layer, std::int64_t max_tokens) {
            const auto held = layer.get("Workspace.for_layer");
            return make_workspace(LayerRef(*held), held->config().top_k, max_tokens,
                                  "Workspace.for_layer");
          },
          py::arg("layer"), py::arg("max_tokens") = 512)
      .def_static(
          "for_stack",
          [](const std::shared_ptr<ExpertStack>& stack, std::int32_t top_k,
             std::int64_t max_tokens) {
            LayerRef layer;
            layer.stack = stack.get();
            // The router of the calls to come is not known here. A router with a group per expert
            // needs the most memory, so a workspace for it suffices for any.
            RouterConfig router;
            router.num_experts = stack->num_experts();
            router.num_groups = stack->num_experts();
            router.top_k = top_k;
            layer.router = &router;
            return make_workspace(layer, top_k, max_tokens, "Workspace.for_stack");
          },
          py::arg("stack").none(false), py::arg("top_k"), py::arg("max_tokens") = 512)
      .def_static(
          "for_matrix",
          [](const std::shared_ptr<QuantMatrix>& matrix, std::int64_t max_rows) {
            const Call call({}, matrix->device());
            return std::make_shared<Workspace>(workspace_bytes(call.context, *matrix, max_rows),
                                               call.context.backend());
          },
          py::arg("matrix").none(false), py::arg("max_rows") = 512)
      .def_property_readonly("nbytes", &Workspace::size)
      .def("__repr__", [](const Workspace& w) {
        return "moesaic.Workspace(" + std::to_string(w.size()) + " bytes)";
      });
  m.def("trim", [] {
    const ReleasedGil release;
    return WorkspaceCache::instance().trim();
  });
}

}  // namespace moesaic::python
