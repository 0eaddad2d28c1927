#include "cpu/pack.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "base/first_error.hpp"
#include "base/pages.hpp"
#include "cpu/cpu_backend.hpp"
#include "cpu/kernels/panel_format.hpp"
#include "cpu/panel_cache.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {
namespace {

static_assert(kRows == kPanelRows);

const std::uint8_t* bytes_of(const std::byte* p) {
  return reinterpret_cast<const std::uint8_t*>(p);
}

/// Writes rows [first, first + 16) of an expert as one panel; rows behind the expert's last are
/// zero.
void pack_panel(const PanelFormat& format, const WeightRef& from, const std::byte* expert,
                std::int64_t first, const std::uint8_t* zero_row, std::uint8_t* panel) {
  const std::uint8_t* rows[kRows];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = first + i < from.rows ? bytes_of(expert) + (first + i) * from.row_stride : zero_row;
  }
  const int blocks_per_record = kRecordCols / format.block_elems;
  std::int64_t record = 0;
  for (std::int64_t col = 0; col < from.cols; col += kRecordCols, ++record) {
    const int blocks = record_blocks(format, from.cols, record);
    interleave_record(format, rows, blocks, record, panel + record * record_bytes(format));
    for (auto& row : rows) row += std::int64_t{blocks_per_record} * format.block_bytes;
  }
}

struct RolePlan {
  Role role;
  RoleWeights* weights;
};

/// Progress of one load over several threads.
class Meter {
 public:
  Meter(const LoadOptions& options, std::int64_t total) : options_(options), total_(total) {}
  /// Adds bytes that are done. Thread 0, the caller of the load, also reports them.
  void add(std::int64_t bytes, int thread) {
    const std::int64_t done = done_.fetch_add(bytes) + bytes;
    if (thread != 0 || !options_.progress || done - reported_ < kReportEvery) return;
    reported_ = done;
    report(done);
  }
  void report(std::int64_t done) {
    if (!options_.progress || cancelled()) return;
    try {
      if (!options_.progress({done, total_, "repack"})) cancelled_ = true;
    } catch (...) {
      error_ = std::current_exception();
      cancelled_ = true;
    }
  }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  std::int64_t done() const { return done_; }
  void throw_if_cancelled() const {
    if (error_) std::rethrow_exception(error_);
    if (cancelled()) {
      throw OperationCancelled(Problem{.operation = "load",
                                       .what = "progress",
                                       .expected = "true to go on",
                                       .got = "false",
                                       .hint = {}});
    }
  }

 private:
  static constexpr std::int64_t kReportEvery = std::int64_t{16} << 20;
  const LoadOptions& options_;
  std::int64_t total_;
  std::int64_t reported_ = 0;  // only thread 0 reads and writes it
  std::atomic<std::int64_t> done_{0};
  std::atomic<bool> cancelled_{false};
  std::exception_ptr error_;
};

/// The memory of one role's panels, by the nodes that they are dealt to.
struct PanelMemory {
  std::vector<std::shared_ptr<std::byte>> shares;
  std::vector<std::int64_t> first;      ///< panel of each share, and their number at the end
  std::vector<const std::byte*> table;  ///< of PanelShares
  PanelShares dealt;
  int bind_error = 0;  ///< the errno value with which a share's pages could not be bound, or 0

  /// Where panel `panel` of an expert, which is one of share `s`, goes.
  std::byte* at(std::size_t s, std::int32_t expert, std::int64_t panel, std::int64_t stride) const {
    const std::int64_t size = first[s + 1] - first[s];
    return shares[s].get() + (expert * size + panel - first[s]) * stride;
  }
};

/// Whether an expert's panels are dealt to the nodes of a pool: not to one node, nor to more nodes
/// than there are panels.
bool deals(std::int64_t panels, const ThreadPool* pool) {
  return pool != nullptr && pool->nodes() > 1 && panels >= pool->nodes();
}

/// Memory for the panels of `to`, dealt to the nodes of the pool, or in one piece.
std::shared_ptr<PanelMemory> allocate_panels(const WeightRef& to, std::int64_t panels,
                                             const ThreadPool* pool) {
  auto memory = std::make_shared<PanelMemory>();
  const std::int64_t experts = to.num_experts;
  if (!deals(panels, pool)) {
    memory->first = {0, panels};
    memory->shares = {allocate_pages(static_cast<std::size_t>(experts * to.expert_stride))};
    return memory;
  }
  const Topology& topology = pool->topology();
  for (std::size_t s = 0; s <= topology.nodes.size(); ++s) {
    memory->first.push_back(topology.first_of(s, panels));
  }
  for (std::size_t s = 0; s < topology.nodes.size(); ++s) {
    const std::int64_t stride = (memory->first[s + 1] - memory->first[s]) * to.row_stride;
    NodePages pages =
        allocate_on_node(static_cast<std::size_t>(experts * stride), topology.nodes[s].id);
    for (std::int64_t e = 0; e < experts; ++e) {
      memory->table.push_back(pages.memory.get() + e * stride);
    }
    memory->shares.push_back(std::move(pages.memory));
    if (memory->bind_error == 0) memory->bind_error = pages.error;
  }
  memory->dealt = {.count = static_cast<std::int32_t>(topology.nodes.size()),
                   .first = memory->first.data(),
                   .table = memory->table.data(),
                   .slots = experts};
  return memory;
}

/// What became of the pages, for the report; empty with one node.
std::string placement_of(const PanelMemory& memory, const ThreadPool* pool) {
  if (memory.dealt.count == 0) {
    return pool != nullptr && pool->nodes() > 1 ? "; too few to deal to nodes" : "";
  }
  const Topology& topology = pool->topology();
  std::string text = "; dealt to " + topology.text();
  if (!topology.binds()) return text;
  if (memory.bind_error == 0) return text + ", pages bound";
  return text + ", pages not bound (mbind: " + std::generic_category().message(memory.bind_error) +
         "), so they lie near the threads that wrote them";
}

/// Fills the memory of a role's panels: with `kept`, where a file has them one expert behind the
/// other, else with the rows of `weights`, repacked.
void fill_panels(const RoleWeights& weights, const WeightRef& to, const std::byte* kept,
                 const PanelMemory& memory, const LoadOptions& options, Meter& meter) {
  const WeightRef& from = weights.ref;
  const auto shares = static_cast<std::int64_t>(memory.shares.size());
  std::int64_t largest = 0;
  for (std::size_t s = 0; s < memory.shares.size(); ++s) {
    largest = std::max(largest, memory.first[s + 1] - memory.first[s]);
  }

  // A chunk is some panels of one expert, about 256 KiB: small enough to report progress often and
  // to keep all threads busy.
  const std::int64_t per_chunk =
      std::clamp<std::int64_t>((std::int64_t{256} << 10) / std::max<std::int64_t>(1, to.row_stride),
                               1, std::max<std::int64_t>(1, largest));
  const std::int64_t parts = (largest + per_chunk - 1) / per_chunk;  // of an expert's share
  const std::vector<std::byte> absent = absent_row(from);
  // Where a chunk's rows are read to that lie in a file.
  std::vector<std::vector<std::byte>> rows;
  if (weights.read && kept == nullptr) {
    const int threads = options.pool != nullptr ? options.pool->threads() : 1;
    rows.resize(static_cast<std::size_t>(threads));
    for (auto& buffer : rows) {
      buffer.resize(
          static_cast<std::size_t>(std::min(from.rows, per_chunk * kRows) * from.row_stride));
    }
  }
  FirstError errors;
  const std::int64_t per_share = from.num_experts * parts;
  const auto pack_chunk = [&](std::int64_t chunk, int thread) {
    if (meter.cancelled()) return;
    const auto s = static_cast<std::size_t>(chunk / per_share);
    const auto e = static_cast<std::int32_t>(chunk % per_share / parts);
    const std::int64_t part = chunk % parts;
    const std::int64_t size = memory.first[s + 1] - memory.first[s];
    const std::int64_t first = memory.first[s] + size * part / parts;
    const std::int64_t last = memory.first[s] + size * (part + 1) / parts;
    if (first == last) return;  // a smaller share than the largest
    std::byte* const out = memory.at(s, e, first, to.row_stride);
    if (kept != nullptr) {
      std::memcpy(out, kept + e * to.expert_stride + first * to.row_stride,
                  static_cast<std::size_t>((last - first) * to.row_stride));
    } else if (!weights.read) {
      pack_panels(from, from.expert(e), first, last, absent, out);
    } else {
      errors.during([&] {
        WeightRef some = from;
        some.rows = std::min(from.rows - first * kRows, (last - first) * kRows);
        const auto bytes = static_cast<std::size_t>(some.rows * from.row_stride);
        const std::span buffer = std::span(rows[static_cast<std::size_t>(thread)]).first(bytes);
        weights.read(from.expert(e) + first * kRows * from.row_stride, buffer);
        pack_panels(some, buffer.data(), 0, last - first, absent, out);
      });
    }
    if (!errors.failed()) meter.add((last - first) * to.row_stride, thread);
  };
  if (options.pool == nullptr) {
    for (std::int64_t chunk = 0; chunk < per_share; ++chunk) pack_chunk(chunk, 0);
  } else if (shares > 1) {
    options.pool->parallel_for_nodes(per_share, pack_chunk);
  } else {
    options.pool->parallel_for(per_share, pack_chunk);
  }
  errors.rethrow();
  meter.throw_if_cancelled();
}

/// Writes panels to their file, in which the experts lie one behind the other.
void keep_panels(const CacheEntry& entry, const WeightRef& to, const PanelMemory& memory,
                 const FolderLock& lock) {
  EntryWriter writer(entry, lock);
  for (std::int32_t e = 0; e < to.num_experts; ++e) {
    for (std::size_t s = 0; s < memory.shares.size(); ++s) {
      const std::int64_t panels = memory.first[s + 1] - memory.first[s];
      writer.write({memory.at(s, e, memory.first[s], to.row_stride),
                    static_cast<std::size_t>(panels * to.row_stride)});
    }
  }
  writer.finish();
}

/// Gives a role its panels in the place of its rows.
void set_panels(const WeightRef& to, std::shared_ptr<const void> owner, RoleWeights& weights) {
  weights.ref = to;
  weights.owner = std::move(owner);
  weights.read = nullptr;
  weights.origin = nullptr;
}

void take_panels(WeightRef to, std::shared_ptr<const std::byte> mapped, RoleWeights& weights) {
  to.base = mapped.get();
  set_panels(to, std::move(mapped), weights);
}

void take_panels(WeightRef to, const std::shared_ptr<PanelMemory>& memory, RoleWeights& weights) {
  if (memory->dealt.count > 0) {
    to.table = memory->table.data();
    to.shares = &memory->dealt;
  } else {
    to.base = memory->shares.front().get();
  }
  set_panels(to, memory, weights);
}

/// How a role came into panels, for the report.
struct Packed {
  std::string decision, reason;
};

/// Gives a role the panels that a weight cache has of it: mapped, or dealt to the nodes of the pool,
/// whose memory they are read into.
Packed take_cached(RoleWeights& weights, const WeightRef& to, const CacheEntry& entry,
                   std::shared_ptr<const std::byte> cached, const LoadOptions& options,
                   Meter& meter) {
  const std::int64_t panels = (to.rows + kRows - 1) / kRows;
  // Mapped pages, which all processes share, are not dealt to nodes.
  if (!deals(panels, options.pool)) {
    meter.add(entry.bytes, 0);
    take_panels(to, std::move(cached), weights);
    return {"cached", "panels are mapped from " + entry.path().string()};
  }
  const std::shared_ptr<PanelMemory> memory = allocate_panels(to, panels, options.pool);
  fill_panels(weights, to, cached.get(), *memory, options, meter);
  take_panels(to, memory, weights);
  return {"cached",
          "panels are read from " + entry.path().string() + placement_of(*memory, options.pool)};
}

CachedPanels look_up(const CacheEntry& entry, Meter& meter) {
  return find_panels(entry, [&] {
    meter.report(meter.done());
    meter.throw_if_cancelled();
  });
}

Packed pack_role(RoleWeights& weights, const LoadOptions& options, Meter& meter) {
  WeightRef to;
  panel_layout(weights.ref, to);
  const std::int64_t panels = (to.rows + kRows - 1) / kRows;
  const ThreadPool* const pool = options.pool;
  CacheEntry entry;
  CachedPanels cached;
  if (options.weight_cache) {
    entry = panel_entry(weights, to, *options.weight_cache);
    cached = look_up(entry, meter);
    if (cached.panels != nullptr) {
      return take_cached(weights, to, entry, std::move(cached.panels), options, meter);
    }
  }
  const std::shared_ptr<PanelMemory> memory = allocate_panels(to, panels, pool);
  fill_panels(weights, to, nullptr, *memory, options, meter);
  Packed packed{"repacked", "panels of 16 rows run fastest" + placement_of(*memory, pool)};
  std::shared_ptr<const std::byte> kept;
  if (options.weight_cache) {
    packed.reason += "; kept in " + entry.path().string() + ", since " + cached.why;
    keep_panels(entry, to, *memory, *cached.to_write);
    cached.to_write = nullptr;
    // So that this process shares the pages too.
    if (!deals(panels, pool)) kept = map_entry(entry, cached.why);
  }
  if (kept != nullptr) {
    take_panels(to, std::move(kept), weights);
  } else {
    take_panels(to, memory, weights);
  }
  return packed;
}

}  // namespace

bool panel_layout(const WeightRef& rows, WeightRef& panels) {
  const PanelFormat* format = find_panel_format(rows.type);
  if (format == nullptr) return false;
  panels = rows;
  panels.layout = WeightLayout::Panels;
  panels.row_stride = panel_bytes(*format, rows.cols);
  panels.expert_stride = (rows.rows + kRows - 1) / kRows * panels.row_stride;
  panels.table = nullptr;
  panels.shares = nullptr;
  panels.base = nullptr;
  return true;
}

std::vector<std::byte> absent_row(const WeightRef& from) {
  if (from.rows % kRows == 0) return {};
  return std::vector<std::byte>(static_cast<std::size_t>(row_bytes(from.type, from.cols)));
}

void pack_panels(const WeightRef& from, const std::byte* expert, std::int64_t first,
                 std::int64_t last, std::span<const std::byte> absent, std::byte* to) {
  const PanelFormat& format = *find_panel_format(from.type);
  const std::int64_t stride = panel_bytes(format, from.cols);
  auto* panels = reinterpret_cast<std::uint8_t*>(to);
  for (std::int64_t p = first; p < last; ++p) {
    pack_panel(format, from, expert, p * kRows, bytes_of(absent.data()),
               panels + (p - first) * stride);
  }
}

void panel_row(const WeightRef& weight, std::int32_t expert, std::int64_t row, std::byte* blocks) {
  const PanelFormat* format = find_panel_format(weight.type);
  require<UnsupportedError>(format != nullptr && weight.layout == WeightLayout::Panels, [&] {
    return Problem{.operation = "panel_row",
                   .what = "weight",
                   .expected = "a type with a panel layout, repacked",
                   .got = std::string(traits(weight.type).name),
                   .hint = {}};
  });
  auto* out = reinterpret_cast<std::uint8_t*>(blocks);
  const std::uint8_t* panel = bytes_of(weight.panel(expert, row / kRows));
  const std::int64_t lane = row % kRows;
  const std::int64_t records = (weight.cols + kRecordCols - 1) / kRecordCols;
  for (std::int64_t record = 0; record < records; ++record) {
    const int count = record_blocks(*format, weight.cols, record);
    const std::uint8_t* from = panel + record * record_bytes(*format);
    std::uint8_t* to = out + record * (kRecordCols / format->block_elems) * format->block_bytes;
    for (int f = 0; f < format->num_fields; ++f) {
      const Field& field = format->fields[f];
      const std::uint8_t* p = from + field_start(*format, f, count, record);
      for (int b = 0; b < count; ++b) {
        for (int c = 0; c < field.bytes; c += field.chunk, p += kRows * field.chunk) {
          std::memcpy(to + b * format->block_bytes + field.offset + c, p + lane * field.chunk,
                      static_cast<std::size_t>(field.chunk));
        }
      }
    }
  }
}

std::optional<std::string> take_cached_panels(RoleWeights& weights, const LoadOptions& options) {
  WeightRef to;
  if (!panel_layout(weights.ref, to)) return std::nullopt;
  const CacheEntry entry = panel_entry(weights, to, options.weight_cache.value());
  Meter meter(options, entry.bytes);
  CachedPanels found = look_up(entry, meter);
  if (found.panels == nullptr) return std::nullopt;
  return take_cached(weights, to, entry, std::move(found.panels), options, meter).reason;
}

void CpuBackend::prepare(ExpertStack::Parts& parts, const LoadOptions& options) const {
  if (options.layout == StackLayout::File) return;
  std::vector<RolePlan> roles;
  std::int64_t total = 0;
  for (const RolePlan& plan : {RolePlan{Role::Gate, &parts.gate}, RolePlan{Role::Up, &parts.up},
                               RolePlan{Role::Down, &parts.down}}) {
    const WeightRef& ref = plan.weights->ref;
    if (!ref || ref.layout == WeightLayout::Panels || ref.slot_map != nullptr) continue;
    const PanelFormat* format = find_panel_format(ref.type);
    if (format == nullptr) continue;
    total += ref.num_experts * ((ref.rows + kRows - 1) / kRows) * panel_bytes(*format, ref.cols);
    roles.push_back(plan);
  }
  Meter meter(options, total);
  for (const RolePlan& plan : roles) {
    const auto [decision, reason] = pack_role(*plan.weights, options, meter);
    for (RoleReport& report : parts.report.roles) {
      if (report.role != plan.role) continue;
      report.decision = decision;
      report.reason = reason;
      report.bytes = plan.weights->ref.num_experts * plan.weights->ref.expert_stride;
    }
    meter.report(meter.done());
    meter.throw_if_cancelled();
  }
}

}  // namespace moesaic::cpu
