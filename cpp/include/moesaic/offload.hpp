#pragma once

/// Models larger than the fast memory. A store holds the experts of all MoE layers in slow memory
/// (a mapped file, or a file that is read piece by piece under a memory limit); a pool says which
/// of them have a slot in fast memory; a layer made on both gives the same results as one that has
/// everything resident. cpp/src/offload/README.md draws the way of an expert.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moesaic/backend.hpp"
#include "moesaic/expert_pool.hpp"
#include "moesaic/layer.hpp"

namespace moesaic {

/// What a forward does with an expert that has no slot.
enum class OnMiss : std::uint8_t {
  Compute,  ///< compute it where it lies in slow memory; residents stay as they are
  Stage,    ///< bring it to fast memory first, into a slot if the pool gives it one
  Error,    ///< throw DeviceError before anything is written
};

/// Runs the experts of a forward when not all of them are in fast memory.
class ExpertResidency {
 public:
  virtual ~ExpertResidency() = default;
  /// Both phases, as Backend::gate_up and Backend::down would run them; `stack` of the calls is
  /// replaced. Nothing is written to the output on an error. Errors: DeviceError (OnMiss::Error),
  /// IoError and FormatError (reading), OutOfMemoryError.
  virtual void run(Context& context, const op::GateUp& gate_up, const op::Down& down) = 0;
  /// What was asked for so far.
  virtual ExpertUsage usage() const = 0;
};

/// One role of a layer in the store, in the matrix form y[n] = sum_k x[k] * w[k, n].
class RoleView {
 public:
  RoleView() = default;
  explicit RoleView(const WeightRef& ref) : ref_(ref) {}
  explicit operator bool() const { return static_cast<bool>(ref_); }

  const WeightRef& ref() const { return ref_; }
  std::int32_t num_experts() const { return ref_.num_experts; }
  std::int64_t k() const { return ref_.cols; }  ///< input features
  std::int64_t n() const { return ref_.rows; }  ///< output features
  /// From one expert to the next: k * n elements for F32, bytes for every other type.
  std::int64_t expert_stride() const;
  /// The bytes of one expert, as stored. Errors: ShapeError.
  std::span<const std::byte> expert_slice(std::int32_t expert) const;
  /// The bytes of all experts. Errors: UnsupportedError when they do not lie one behind the other.
  std::span<const std::byte> as_slice() const;

 private:
  WeightRef ref_{};
};

struct LayerMoeWeights {
  std::int32_t layer_index = 0;              ///< block number in the model
  std::shared_ptr<const ExpertStack> stack;  ///< as stored
  RoleView gate, up, down;                   ///< gate and up: k = H, n = I; down: k = I, n = H
  std::int64_t expert_bytes = 0;             ///< bytes of one expert, all roles, as stored
};

struct StoreOptions {
  /// Unset: experts are used where the file is mapped. Set: they are read with several requests in
  /// flight, and slots and staging together stay below this many bytes.
  std::optional<std::int64_t> memory_limit;
  /// With a limit: experts between disk and slots, 0: 16, or fewer when they would take more than
  /// half of the limit.
  std::int32_t staging = 0;
  std::int32_t io_threads = 16;
  /// With a limit: experts of the next layer that each forward asks for ahead, by routing history.
  /// While too few of them are used, none are asked for.
  std::int32_t read_ahead = 4;
  /// With a limit: past the page cache (true), through it (false), or past it where the file system
  /// can (unset).
  std::optional<bool> direct_io;
};

/// Bytes that a store holds in fast memory and staging buffers.
struct StoreMemory {
  std::int64_t slots = 0, staging = 0;
  std::int64_t limit = 0;  ///< 0: none
};

/// What the disk tier did.
struct IoStats {
  std::int64_t reads = 0, bytes = 0;
  std::int64_t most_in_flight = 0;
  std::int64_t cached = 0;      ///< experts asked for that were in staging already
  std::int64_t ahead = 0;       ///< experts read ahead
  std::int64_t ahead_used = 0;  ///< experts read ahead and asked for later
  bool guessing = true;         ///< false while reads ahead by history are paused
};

namespace offload {
struct StoredExperts;
}

/// Experts of all MoE layers of a model. Thread safe; refers to its file while it lives.
class MoeExpertStore : public std::enable_shared_from_this<MoeExpertStore> {
 public:
  /// Every layer of file->moe_layers(), as stored. Errors: as ExpertStack::load_from_gguf;
  /// ConfigError for a bad option or a limit below two experts, UnsupportedError for a limit on a
  /// file opened without mmap.
  static std::shared_ptr<MoeExpertStore> from_gguf(std::shared_ptr<GgufFile> file,
                                                   const StoreOptions& options = {});

  /// The experts of a safetensors checkpoint, as what read its names and configuration describes
  /// them; only with a memory limit. Errors: ConfigError and UnsupportedError as above, IoError,
  /// FormatError for a file that changed or a tensor that does not fit.
  static std::shared_ptr<MoeExpertStore> from_checkpoint(const offload::StoredExperts& experts,
                                                         const StoreOptions& options);

  /// Arrays in the grouped-matmul layout [E, k, n], f32, f16 or bf16; `gate` may be null (ungated).
  struct ArrayLayer {
    std::int32_t layer_index = 0;
    ConstTensorView gate, up, down;  ///< [E, H, I], [E, H, I], [E, I, H]
  };
  /// Copies the arrays, transposed, into memory of its own. Errors: ShapeError, DTypeError naming
  /// layer and role.
  static std::shared_ptr<MoeExpertStore> from_arrays(std::span<const ArrayLayer> layers);

  ~MoeExpertStore();

  std::int32_t num_layers() const;
  /// Errors: ShapeError.
  const LayerMoeWeights& layer(std::int32_t i) const;
  /// Where the store has a block of the model (LayerMoeWeights::layer_index). Throws ShapeError that
  /// lists the blocks.
  std::int32_t place_of(std::int32_t block) const;
  const std::shared_ptr<GgufFile>& file() const;  ///< null for arrays and checkpoints

  using Pools = std::span<const std::shared_ptr<ExpertPool>>;
  /// Each pool that is due by its own policy is refreshed from its layer's ids. Nothing moves yet.
  /// Errors: ShapeError unless there is one pool of the right size and one list of ids per layer.
  std::vector<RefreshResult> refresh_pools(Pools pools,
                                           std::span<const std::span<const std::int32_t>> captured,
                                           std::int64_t step, bool is_prefill_block,
                                           ExecMode mode = ExecMode::Reuse);
  /// Makes the slots hold what the pools say, moving only what changed. Returns the bytes moved.
  /// Forwards may run meanwhile: they see an expert in its slot once its copy is complete, and a
  /// slot is not overwritten while a forward reads it. After an error what was not loaded counts as
  /// not resident, and the next call tries again. Errors: ShapeError, ConfigError (a layer already
  /// runs with another pool, the memory limit), IoError, FormatError.
  std::int64_t apply(Context& context, Pools pools);
  /// apply() for one layer and its pool.
  std::int64_t apply(Context& context, std::int32_t i, const std::shared_ptr<ExpertPool>& pool);

  /// Runs layer `i` on the slots of its pool. Loads nothing: experts are cold until apply() or,
  /// with OnMiss::Stage, until they are needed. Errors: as apply.
  std::shared_ptr<ExpertResidency> residency(std::int32_t i,
                                             const std::shared_ptr<ExpertPool>& pool,
                                             OnMiss on_miss, const Backend& backend);
  /// A whole layer of the file, with router and shared experts from there, under a config of the
  /// caller's where there is one (MoeLayer::from_gguf_with_config). Errors: UnsupportedError for a
  /// store of arrays (make a MoeLayer from parts with residency()).
  MoeLayer make_layer(std::int32_t i, const std::shared_ptr<ExpertPool>& pool, OnMiss on_miss,
                      const LoadOptions& options, std::optional<MoeConfig> config = {});
  /// Says that layer `i` will soon be asked for these experts, by a prediction of the caller's: those
  /// that have no slot begin to be read, as many as half of the staging buffers hold; a mapped file is
  /// read by the system. Negative ids are skipped. Errors: ShapeError for an id out of range.
  void prefetch(std::int32_t i, std::span<const std::int32_t> experts);

  /// How many experts of each layer have room in `memory` (unset: below the memory limit, and without
  /// one all of them), beside the buffers, `reserve` bytes and whatever rounds up to pages: equally
  /// many, one more in the first layers where that fits. Errors: ConfigError when not even the
  /// reserve fits.
  std::vector<std::int32_t> fitting_budgets(const Backend& backend, std::int64_t reserve,
                                            std::optional<std::int64_t> memory = {}) const;
  /// What pools of these budgets take, one a layer, rounded up to pages. Errors: ShapeError.
  std::int64_t slot_bytes(const Backend& backend, std::span<const std::int32_t> budgets) const;

  /// How experts are read: "mapped", "O_DIRECT", or "page cache" and why.
  const std::string& reading() const;
  /// The live map of a layer, [E], -1 = not in fast memory; empty before the first apply.
  std::vector<std::int32_t> slot_map(std::int32_t i) const;

  /// The pool that a layer runs with; null before the first apply.
  std::shared_ptr<ExpertPool> pool(std::int32_t i) const;

  StoreMemory memory() const;
  IoStats io_stats() const;

 private:
  MoeExpertStore();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moesaic
