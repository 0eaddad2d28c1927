#include <algorithm>
#include <string>
#include <utility>

#include "base/fork.hpp"
#include "gguf/mapped_file.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"
#include "moesaic/offload.hpp"
#include "offload/checkpoint.hpp"
#include "offload/pooled_experts.hpp"

namespace moesaic {
namespace {

constexpr std::int32_t kDefaultStaging = 16;
constexpr std::int32_t kLeastStaging = 2;

LayerMoeWeights layer_of(std::int32_t index, ExpertStack stack) {
  LayerMoeWeights weights;
  weights.layer_index = index;
  weights.stack = std::make_shared<const ExpertStack>(std::move(stack));
  weights.gate = RoleView(weights.stack->gate().ref);
  weights.up = RoleView(weights.stack->up().ref);
  weights.down = RoleView(weights.stack->down().ref);
  weights.expert_bytes = weights.stack->bytes_per_expert();
  return weights;
}

Problem problem(const char* operation, std::string what, std::string expected, std::string got,
                std::string hint = {}) {
  return {.operation = operation,
          .what = std::move(what),
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = std::move(hint)};
}

void check_options(const StoreOptions& options) {
  const auto check = [](bool ok, const char* what, const char* expected, std::int64_t got) {
    require<ConfigError>(
        ok, [&] { return problem("MoeExpertStore", what, expected, std::to_string(got)); });
  };
  check(options.staging == 0 || options.staging >= kLeastStaging, "staging", "0, or at least 2",
        options.staging);
  check(options.io_threads >= 1 && options.io_threads <= 256, "io_threads", "1 to 256",
        options.io_threads);
  check(options.read_ahead >= 0, "read_ahead", "at least 0", options.read_ahead);
  check(options.memory_limit.value_or(0) >= 0, "memory_limit", "at least 0",
        options.memory_limit.value_or(0));
}

/// How many experts the staging buffers between disk and slots hold, `expert_bytes` each.
std::int32_t staging_of(const StoreOptions& options, std::int64_t expert_bytes) {
  if (options.staging > 0) return options.staging;
  const std::int64_t half = *options.memory_limit / 2 / std::max<std::int64_t>(1, expert_bytes);
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(half, kLeastStaging, kDefaultStaging));
}

/// A view [E, k, n] read as [E, n, k].
ConstTensorView transposed(ConstTensorView view) {
  if (view.rank == 3) {
    std::swap(view.shape[1], view.shape[2]);
    std::swap(view.strides[1], view.strides[2]);
  }
  return view;
}

void check_array(const ConstTensorView& view, std::int32_t layer, const char* role,
                 const std::int64_t (&shape)[3], const char* form) {
  const bool fits = view.rank == 3 && view.data != nullptr && view.dim(0) == shape[0] &&
                    view.dim(1) == shape[1] && view.dim(2) == shape[2];
  require<ShapeError>(fits, [&] {
    return problem("MoeExpertStore.from_arrays", "layer " + std::to_string(layer) + " " + role,
                   std::string(form) + " = [" + std::to_string(shape[0]) + ", " +
                       std::to_string(shape[1]) + ", " + std::to_string(shape[2]) + "]",
                   view.data == nullptr ? "none" : describe(view));
  });
}

}  // namespace

struct MoeExpertStore::Impl final : private ForkHook {
  std::shared_ptr<GgufFile> file;
  offload::StoreParts parts;
  std::int64_t limit = 0;
  std::string reading = "mapped";
  mutable std::mutex mutex;  ///< one reads `tables`, or makes what goes there, at a time
  /// Held while `tables` changes, beside the other: a forked child sees whole pointers.
  LeafMutex change_mutex;
  std::vector<std::shared_ptr<offload::SlotTable>> tables;

  ~Impl() override { unwatch(); }
  void forked() noexcept override { renew(mutex); }

  /// Reads experts from disk under the limit of the options. Errors: ConfigError where the buffers
  /// do not fit.
  void read_from_disk(std::vector<std::vector<offload::ExpertRanges>> ranges,
                      offload::Reader reader, offload::Decoders decoders,
                      const StoreOptions& options) {
    limit = *options.memory_limit;
    const std::int64_t one = offload::largest_expert(ranges, decoders);
    const offload::DiskOptions disk{staging_of(options, one), options.io_threads, reader.alignment};
    // Divided first: the product of what a caller asks for could overflow.
    const bool fits =
        one <= limit / disk.buffers && offload::disk_buffer_bytes(ranges, disk, decoders) <= limit;
    require<ConfigError>(fits, [&] {
      return problem("MoeExpertStore", "memory_limit",
                     "room for " + std::to_string(disk.buffers) + " experts of " +
                         std::to_string(one) + " bytes, padded for reads",
                     std::to_string(limit));
    });
    parts.read_ahead = options.read_ahead;
    reading = reader.way;
    parts.source = offload::make_disk_source(std::move(ranges), std::move(reader.read), disk,
                                             std::move(decoders));
  }

  void finish() {
    for (const LayerMoeWeights& layer : parts.layers) {
      parts.misses.push_back(std::make_unique<offload::MissHistory>(layer.stack->num_experts()));
    }
    tables.resize(parts.layers.size());
    watch();
  }

  std::int64_t slots_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& table : tables) bytes += table != nullptr ? table->nbytes() : 0;
    return bytes;
  }

  void check_limit(std::int64_t more) const {
    const std::int64_t held = slots_bytes() + parts.source->nbytes();
    require<ConfigError>(limit == 0 || held + more <= limit, [&] {
      return problem("MoeExpertStore", "memory_limit",
                     std::to_string(limit) + " bytes to hold everything",
                     std::to_string(held) + " bytes held and " + std::to_string(more) + " more",
                     "lower the pools' budgets (fitting_budgets) or raise the limit");
    });
  }

  void set(std::shared_ptr<offload::SlotTable>& table, std::shared_ptr<offload::SlotTable> to) {
    const std::lock_guard no_fork(change_mutex);
    table.swap(to);
  }

  std::shared_ptr<offload::SlotTable> table(std::int32_t i, const std::shared_ptr<ExpertPool>& pool,
                                            const Backend& backend) {
    const LayerMoeWeights& weights = parts.layers[static_cast<std::size_t>(i)];
    const std::int64_t bytes = offload::slot_bytes(backend, *weights.stack, pool->budget());
    const std::lock_guard lock(mutex);
    std::shared_ptr<offload::SlotTable>& table = tables[static_cast<std::size_t>(i)];
    if (table == nullptr || table->pool_ptr() != pool) {
      require<ConfigError>(table == nullptr || table.use_count() == 1, [&] {
        return problem("MoeExpertStore", "layer " + std::to_string(weights.layer_index),
                       "the pool it runs with", "another one",
                       "close the layers made with the other pool first");
      });
      set(table, nullptr);
      check_limit(bytes);
      set(table, std::make_shared<offload::SlotTable>(weights, i, pool, backend));
    }
    return table;
  }
};

MoeExpertStore::MoeExpertStore() : impl_(std::make_unique<Impl>()) {}
MoeExpertStore::~MoeExpertStore() = default;

std::shared_ptr<MoeExpertStore> MoeExpertStore::from_gguf(std::shared_ptr<GgufFile> file,
                                                          const StoreOptions& options) {
  check_options(options);
  std::shared_ptr<MoeExpertStore> store(new MoeExpertStore());
  Impl& impl = *store->impl_;
  for (const std::int32_t index : file->moe_layers()) {
    LoadOptions as_stored;
    as_stored.layout = StackLayout::File;
    impl.parts.layers.push_back(
        layer_of(index, ExpertStack::load_from_gguf(file, index, as_stored)));
  }
  require<FormatError>(!impl.parts.layers.empty(), [&] {
    return problem("MoeExpertStore", file->path().string(), "layers with experts", "none");
  });
  if (options.memory_limit) {
    impl.read_from_disk(offload::locate_experts(*file, impl.parts.layers),
                        offload::reader_of(file->input_files(), options.direct_io), {}, options);
  } else {
    impl.parts.source = offload::make_mapped_source(impl.parts.layers);
  }
  impl.file = std::move(file);
  impl.finish();
  return store;
}

std::shared_ptr<MoeExpertStore> MoeExpertStore::from_checkpoint(
    const offload::StoredExperts& experts, const StoreOptions& options) {
  check_options(options);
  require<ConfigError>(options.memory_limit.has_value(), [&] {
    return problem("MoeExpertStore", "memory_limit", "bytes", "none",
                   "experts of a checkpoint are read, and never used where a file is mapped");
  });
  require<FormatError>(!experts.layers.empty(), [&] {
    return problem("MoeExpertStore", experts.name, "layers with experts", "none");
  });
  std::vector<std::shared_ptr<const gguf::InputFile>> files;
  for (std::size_t i = 0; i < experts.files.size(); ++i) {
    files.push_back(std::make_shared<const gguf::InputFile>(experts.files[i]));
    require<FormatError>(std::cmp_equal(files[i]->size(), experts.file_bytes[i]), [&] {
      return problem(
          "MoeExpertStore", experts.files[i],
          "the file that was looked at, of " + std::to_string(experts.file_bytes[i]) + " bytes",
          std::to_string(files[i]->size()));
    });
  }
  std::shared_ptr<MoeExpertStore> store(new MoeExpertStore());
  Impl& impl = *store->impl_;
  std::vector<std::vector<offload::ExpertRanges>> ranges;
  offload::Decoders decoders;
  for (const offload::StoredLayer& layer : experts.layers) {
    impl.parts.layers.push_back(layer_of(layer.block, offload::stack_without_experts(layer)));
    decoders.push_back(offload::make_decoder(layer, *impl.parts.layers.back().stack));
    ranges.push_back(layer.ranges);
  }
  impl.read_from_disk(std::move(ranges), offload::reader_of(files, options.direct_io),
                      std::move(decoders), options);
  impl.finish();
  return store;
}

std::shared_ptr<MoeExpertStore> MoeExpertStore::from_arrays(std::span<const ArrayLayer> layers) {
  require<ShapeError>(!layers.empty(), [] {
    return problem("MoeExpertStore.from_arrays", "layers", "at least one", "none");
  });
  std::shared_ptr<MoeExpertStore> store(new MoeExpertStore());
  Impl& impl = *store->impl_;
  for (const ArrayLayer& layer : layers) {
    const ConstTensorView& up = layer.up;
    require<ShapeError>(up.rank == 3 && up.data != nullptr && !up.empty(), [&] {
      return problem("MoeExpertStore.from_arrays",
                     "layer " + std::to_string(layer.layer_index) + " up",
                     "[E, H, I], none of them 0", up.data == nullptr ? "none" : describe(up));
    });
    const std::int64_t experts = up.dim(0), hidden = up.dim(1), intermediate = up.dim(2);
    if (layer.gate.data != nullptr) {
      check_array(layer.gate, layer.layer_index, "gate", {experts, hidden, intermediate},
                  "[E, H, I]");
    }
    check_array(layer.down, layer.layer_index, "down", {experts, intermediate, hidden},
                "[E, I, H]");
    impl.parts.layers.push_back(
        layer_of(layer.layer_index,
                 ExpertStack::from_dense_stacks(transposed(layer.gate), transposed(layer.up),
                                                transposed(layer.down))));
  }
  impl.parts.source = offload::make_mapped_source(impl.parts.layers);
  impl.finish();
  return store;
}

std::int32_t MoeExpertStore::num_layers() const {
  return static_cast<std::int32_t>(impl_->parts.layers.size());
}

const std::shared_ptr<GgufFile>& MoeExpertStore::file() const { return impl_->file; }

const LayerMoeWeights& MoeExpertStore::layer(std::int32_t i) const {
  require<ShapeError>(i >= 0 && i < num_layers(), [&] {
    return problem("MoeExpertStore", "layer", "0 to " + std::to_string(num_layers() - 1),
                   std::to_string(i), "layers count in the store, not in the model");
  });
  return impl_->parts.layers[static_cast<std::size_t>(i)];
}

std::int32_t MoeExpertStore::place_of(std::int32_t block) const {
  std::string blocks;
  for (std::int32_t i = 0; i < num_layers(); ++i) {
    const std::int32_t index = layer(i).layer_index;
    if (index == block) return i;
    blocks += (i == 0 ? "" : ", ") + std::to_string(index);
  }
  throw ShapeError(
      problem("MoeExpertStore", "block", "one with experts: " + blocks, std::to_string(block)));
}

namespace {

void check_pool(const LayerMoeWeights& layer, const std::shared_ptr<ExpertPool>& pool) {
  const std::int32_t experts = layer.stack->num_experts();
  require<ShapeError>(pool != nullptr && pool->num_experts() == experts, [&] {
    return problem("MoeExpertStore", "pool of layer " + std::to_string(layer.layer_index),
                   std::to_string(experts) + " experts",
                   pool == nullptr ? "none" : std::to_string(pool->num_experts()));
  });
}

void check_pools(const MoeExpertStore& store, MoeExpertStore::Pools pools) {
  require<ShapeError>(static_cast<std::int32_t>(pools.size()) == store.num_layers(), [&] {
    return problem("MoeExpertStore", "pools", std::to_string(store.num_layers()) + ", one a layer",
                   std::to_string(pools.size()));
  });
  for (std::int32_t i = 0; i < store.num_layers(); ++i) {
    check_pool(store.layer(i), pools[static_cast<std::size_t>(i)]);
  }
}

}  // namespace

std::vector<RefreshResult> MoeExpertStore::refresh_pools(
    Pools pools, std::span<const std::span<const std::int32_t>> ids, std::int64_t step,
    bool is_prefill_block, ExecMode mode) {
  check_pools(*this, pools);
  require<ShapeError>(ids.size() == pools.size(), [&] {
    return problem("MoeExpertStore.refresh_pools", "ids",
                   std::to_string(pools.size()) + " lists, one a layer",
                   std::to_string(ids.size()));
  });
  for (std::size_t i = 0; i < pools.size(); ++i) {
    for (const std::int32_t id : ids[i]) {
      require<ShapeError>(id >= -1 && id < pools[i]->num_experts(), [&] {
        return problem("MoeExpertStore.refresh_pools", "ids of layer " + std::to_string(i),
                       "-1 to " + std::to_string(pools[i]->num_experts() - 1), std::to_string(id));
      });
    }
  }
  std::vector<RefreshResult> results(pools.size());
  for (std::size_t i = 0; i < pools.size(); ++i) {
    if (!pools[i]->should_refresh(step, is_prefill_block, mode)) continue;
    results[i] = pools[i]->refresh_from_indices(ids[i]);
    results[i].bytes = static_cast<std::int64_t>(results[i].promotions.size()) *
                       layer(static_cast<std::int32_t>(i)).expert_bytes;
  }
  return results;
}

std::int64_t MoeExpertStore::apply(Context& context, Pools pools) {
  check_pools(*this, pools);
  std::int64_t moved = 0;
  for (std::int32_t i = 0; i < num_layers(); ++i) {
    moved += apply(context, i, pools[static_cast<std::size_t>(i)]);
  }
  return moved;
}

std::int64_t MoeExpertStore::apply(Context& context, std::int32_t i,
                                   const std::shared_ptr<ExpertPool>& pool) {
  check_pool(layer(i), pool);
  return impl_->table(i, pool, context.backend())->reconcile(context, *impl_->parts.source);
}

void MoeExpertStore::prefetch(std::int32_t i, std::span<const std::int32_t> experts) {
  const std::int32_t count = layer(i).stack->num_experts();
  const std::vector<std::int32_t> map = slot_map(i);
  std::vector<std::int32_t> cold;
  for (const std::int32_t e : experts) {
    require<ShapeError>(e < count, [&] {
      return problem("MoeExpertStore.prefetch", "ids", "below " + std::to_string(count),
                     std::to_string(e));
    });
    const bool has_slot = e < 0 || (!map.empty() && map[static_cast<std::size_t>(e)] >= 0);
    if (!has_slot && std::ranges::find(cold, e) == cold.end()) cold.push_back(e);
  }
  impl_->parts.source->expect(i, cold, offload::Expect::Told);
}

std::vector<std::int32_t> MoeExpertStore::fitting_budgets(
    const Backend& backend, std::int64_t reserve, std::optional<std::int64_t> memory) const {
  const auto& layers = impl_->parts.layers;
  std::vector<std::int32_t> budgets;
  for (const LayerMoeWeights& layer : layers) budgets.push_back(layer.stack->num_experts());
  if (!memory && impl_->limit == 0) return budgets;
  const std::int64_t limit = memory.value_or(impl_->limit);
  const std::int64_t buffers = impl_->parts.source->nbytes();
  const bool fits = reserve >= 0 && limit >= 0 && reserve <= limit && buffers <= limit - reserve;
  require<ConfigError>(fits, [&] {
    return problem("MoeExpertStore", memory ? "memory" : "memory_limit",
                   std::to_string(buffers) + " bytes of buffers and " + std::to_string(reserve) +
                       " beside experts",
                   std::to_string(limit),
                   "raise the limit, or lower staging or the tokens of a call");
  });
  const std::int64_t room = limit - buffers - reserve;
  const auto bytes = [&](std::size_t i, std::int32_t budget) {
    return offload::slot_bytes(backend, *layers[i].stack,
                               std::min(budget, layers[i].stack->num_experts()));
  };
  const auto all = [&](std::int32_t budget) {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) sum += bytes(i, budget);
    return sum;
  };
  // The largest budget that fits in every layer, by bisection.
  std::int32_t low = 0;
  std::int32_t high = *std::ranges::max_element(budgets);
  while (low < high) {
    const std::int32_t middle = low + (high - low + 1) / 2;
    if (all(middle) <= room) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  std::int64_t left = room - all(low);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::int32_t most = budgets[i];
    budgets[i] = std::min(low, most);
    const std::int64_t more = bytes(i, low + 1) - bytes(i, low);
    if (low >= most || more > left) continue;
    left -= more;
    ++budgets[i];
  }
  return budgets;
}

std::int64_t MoeExpertStore::slot_bytes(const Backend& backend,
                                        std::span<const std::int32_t> budgets) const {
  const auto& layers = impl_->parts.layers;
  std::int64_t bytes = 0;
  require<ShapeError>(budgets.size() == layers.size(), [&] {
    return problem("MoeExpertStore.slot_bytes", "budgets",
                   std::to_string(layers.size()) + ", one a layer", std::to_string(budgets.size()));
  });
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::int32_t experts = layers[i].stack->num_experts();
    bytes += offload::slot_bytes(backend, *layers[i].stack, std::clamp(budgets[i], 0, experts));
  }
  return bytes;
}

const std::string& MoeExpertStore::reading() const { return impl_->reading; }

std::shared_ptr<ExpertResidency> MoeExpertStore::residency(std::int32_t i,
                                                           const std::shared_ptr<ExpertPool>& pool,
                                                           OnMiss on_miss, const Backend& backend) {
  check_pool(layer(i), pool);
  return std::make_shared<offload::PooledExperts>(shared_from_this(), impl_->parts,
                                                  impl_->table(i, pool, backend), on_miss);
}

MoeLayer MoeExpertStore::make_layer(std::int32_t i, const std::shared_ptr<ExpertPool>& pool,
                                    OnMiss on_miss, const LoadOptions& options,
                                    std::optional<MoeConfig> config) {
  const LayerMoeWeights& weights = layer(i);
  require<UnsupportedError>(impl_->file != nullptr, [] {
    return problem("MoeExpertStore", "layer", "a store made from a file",
                   "one of arrays, which knows no router", "give a config and a router weight");
  });
  require<ConfigError>(options.backend != nullptr, [] {
    return problem("MoeExpertStore", "options.backend", "a backend", "none");
  });
  auto resident = residency(i, pool, on_miss, *options.backend);
  if (config) {
    return MoeLayer::from_gguf_with_config(impl_->file, weights.layer_index, *std::move(config),
                                           options, weights.stack, std::move(resident));
  }
  return MoeLayer::from_gguf(impl_->file, weights.layer_index, options, weights.stack,
                             std::move(resident));
}

std::vector<std::int32_t> MoeExpertStore::slot_map(std::int32_t i) const {
  layer(i);
  const std::lock_guard lock(impl_->mutex);
  const auto& table = impl_->tables[static_cast<std::size_t>(i)];
  return table == nullptr ? std::vector<std::int32_t>() : table->slot_map();
}

std::shared_ptr<ExpertPool> MoeExpertStore::pool(std::int32_t i) const {
  layer(i);
  const std::lock_guard lock(impl_->mutex);
  const auto& table = impl_->tables[static_cast<std::size_t>(i)];
  return table == nullptr ? nullptr : table->pool_ptr();
}

StoreMemory MoeExpertStore::memory() const {
  const std::lock_guard lock(impl_->mutex);
  return {impl_->slots_bytes(), impl_->parts.source->nbytes(), impl_->limit};
}

IoStats MoeExpertStore::io_stats() const { return impl_->parts.source->stats(); }

}  // namespace moesaic
