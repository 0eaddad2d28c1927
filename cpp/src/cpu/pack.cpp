#include "cpu/pack.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/first_error.hpp"
#include "base/pages.hpp"
#include "cpu/cpu_backend.hpp"
#include "cpu/kernels/panel_format.hpp"
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

void pack_role(RoleWeights& weights, const LoadOptions& options, Meter& meter) {
  const WeightRef from = weights.ref;
  WeightRef to;
  panel_layout(from, to);
  const std::int64_t panels = (from.rows + kRows - 1) / kRows;
  const std::shared_ptr<std::byte> memory =
      allocate_pages(static_cast<std::size_t>(from.num_experts * to.expert_stride));
  to.base = memory.get();

  // A chunk is some panels of one expert, about 256 KiB: small enough to report progress often and
  // to keep all threads busy.
  const std::int64_t per_chunk =
      std::clamp<std::int64_t>((std::int64_t{256} << 10) / std::max<std::int64_t>(1, to.row_stride),
                               1, std::max<std::int64_t>(1, panels));
  const std::int64_t chunks_per_expert = (panels + per_chunk - 1) / per_chunk;
  const std::vector<std::byte> absent = absent_row(from);
  // Where a chunk's rows are read to that lie in a file.
  std::vector<std::vector<std::byte>> rows;
  if (weights.read) {
    const int threads = options.pool != nullptr ? options.pool->threads() : 1;
    rows.resize(static_cast<std::size_t>(threads));
    for (auto& buffer : rows) {
      buffer.resize(
          static_cast<std::size_t>(std::min(from.rows, per_chunk * kRows) * from.row_stride));
    }
  }
  FirstError errors;
  const auto pack_chunk = [&](std::int64_t chunk, int thread) {
    if (meter.cancelled()) return;
    const auto e = static_cast<std::int32_t>(chunk / chunks_per_expert);
    const std::int64_t first = chunk % chunks_per_expert * per_chunk;
    const std::int64_t last = std::min(panels, first + per_chunk);
    std::byte* const out = memory.get() + e * to.expert_stride;
    if (!weights.read) {
      pack_panels(from, from.expert(e), first, last, absent, out);
    } else {
      errors.during([&] {
        WeightRef part = from;
        part.rows = std::min(from.rows - first * kRows, (last - first) * kRows);
        const auto bytes = static_cast<std::size_t>(part.rows * from.row_stride);
        const std::span buffer = std::span(rows[static_cast<std::size_t>(thread)]).first(bytes);
        weights.read(from.expert(e) + first * kRows * from.row_stride, buffer);
        pack_panels(part, buffer.data(), 0, last - first, absent, out + first * to.row_stride);
      });
    }
    if (!errors.failed()) meter.add((last - first) * to.row_stride, thread);
  };
  const std::int64_t chunks = from.num_experts * chunks_per_expert;
  if (options.pool != nullptr) {
    options.pool->parallel_for(chunks, pack_chunk);
  } else {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) pack_chunk(chunk, 0);
  }
  errors.rethrow();
  meter.throw_if_cancelled();
  weights.ref = to;
  weights.owner = memory;
  weights.read = nullptr;
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
    pack_panel(format, from, expert, p * kRows, bytes_of(absent.data()), panels + p * stride);
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
  const std::uint8_t* panel = bytes_of(weight.expert(expert)) + row / kRows * weight.row_stride;
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
    pack_role(*plan.weights, options, meter);
    for (RoleReport& report : parts.report.roles) {
      if (report.role != plan.role) continue;
      report.decision = "repacked";
      report.reason = "panels of 16 rows run fastest";
      report.bytes = plan.weights->ref.num_experts * plan.weights->ref.expert_stride;
    }
    meter.report(meter.done());
    meter.throw_if_cancelled();
  }
}

}  // namespace moesaic::cpu
