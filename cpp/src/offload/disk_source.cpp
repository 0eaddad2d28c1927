// The disk tier. A few buffers, each large enough for one expert, are filled by threads that call
// pread. An expert is cut into pieces, so that several requests are in flight even for a single
// one; page faults of a mapping would keep less than one in flight. Reads that a forward waits for
// go before reads ahead. Where reads must be aligned (O_DIRECT), the bytes around a piece of an expert
// come along: a buffer has room for them. Experts that no kernel reads as the file has them are decoded
// by the thread that read their last piece, into the end of their buffer.
//
//   open, expect(Needed) ─> demand queue ─┐               ┌─> buffer: reading, decoding ─> ready ─> leased
//   expect(Told, Guessed) ──> ahead queue ─┴> I/O threads ─┘      ^                                   │
//                                                                 └────── cached, LRU first <─────────┘

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <deque>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <thread>

#include "base/fork.hpp"
#include "base/pages.hpp"
#include "moesaic/error.hpp"
#include "moesaic/interrupt.hpp"
#include "offload/source.hpp"

namespace moesaic::offload {
namespace {

constexpr std::int64_t kAlignment = 64;
/// Large enough that a request costs little beside its bytes, and so small that the experts of a call
/// arrive one after the other: the first are computed while the last are read.
constexpr std::int64_t kPiece = std::int64_t{1} << 19;

std::int64_t round_up(std::int64_t bytes, std::int64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

/// What is read for a range: whole units of the alignment, and where in the buffer of its expert.
struct Window {
  std::uint64_t offset = 0;  ///< in the file
  std::int64_t bytes = 0;
  std::int64_t at = 0;    ///< in the buffer
  std::int64_t skip = 0;  ///< from the window's first byte to the range's
};

using Windows = std::array<Window, kMaxPieces>;

/// The windows of an expert's pieces, and the bytes of a buffer that holds them.
std::int64_t windows_of(const ExpertRanges& ranges, std::int64_t alignment, Windows& windows) {
  std::int64_t at = 0;
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const FileRange& range = ranges[i];
    const auto skip =
        static_cast<std::int64_t>(range.offset & (static_cast<std::uint64_t>(alignment) - 1));
    const std::int64_t bytes = range.bytes == 0 ? 0 : round_up(skip + range.bytes, alignment);
    windows[i] = {range.offset - static_cast<std::uint64_t>(skip), bytes, at, skip};
    at += round_up(bytes, std::max(kAlignment, alignment));
  }
  return at;
}

std::int64_t largest_buffer(const std::vector<std::vector<ExpertRanges>>& ranges,
                            std::int64_t alignment, const Decoders& decoders) {
  std::int64_t largest = 0;
  Windows windows;
  for (std::size_t layer = 0; layer < ranges.size(); ++layer) {
    const std::int64_t decoded =
        decoders.empty() ? 0 : round_up(decoders[layer]->nbytes(), std::max(kAlignment, alignment));
    for (const ExpertRanges& expert : ranges[layer]) {
      largest = std::max(largest, windows_of(expert, alignment, windows) + decoded);
    }
  }
  return largest;
}

/// Whether guesses are worth their reads. It judges them by the dozen: where too few were asked for
/// before their buffer went to another expert, it says no for a long while, and then tries again.
class GuessGauge {
 public:
  bool listening() {
    if (pause_ == 0) return true;
    --pause_;
    return false;
  }
  bool paused() const { return pause_ > 0; }
  void judge(bool used) {
    ++judged_;
    used_ += used ? 1 : 0;
    if (judged_ < kTrial) return;
    if (used_ * kWorth < judged_) pause_ = kPause;
    judged_ = used_ = 0;
  }

 private:
  static constexpr int kTrial = 24;
  static constexpr int kWorth =
      2;  ///< one of so many must be used, or reads in vain cost more time
  static constexpr int kPause = 4096;  ///< calls of expect; a few hundred tokens of a model
  int judged_ = 0, used_ = 0, pause_ = 0;
};

struct Buffer {
  std::byte* memory = nullptr;
  std::int32_t layer = -1, expert = -1;  ///< -1: it holds no expert
  std::int32_t pending = 0;              ///< pieces not read yet
  std::int32_t leases = 0;
  std::optional<Expect> ahead;  ///< read ahead so, and not asked for yet
  bool incomplete = false;      ///< some of its pieces were dropped
  std::uint64_t used_at = 0;
  std::exception_ptr error;
  ExpertBytes roles{};  ///< once nothing is pending
  bool idle() const { return pending == 0 && leases == 0; }
};

struct Piece {
  Buffer* buffer;
  FileRange range;
  std::byte* to;
};

class DiskSource final : public ExpertSource, private ForkHook {
 public:
  DiskSource(std::vector<std::vector<ExpertRanges>> ranges, ReadFn read, const DiskOptions& options,
             Decoders decoders)
      : ranges_(std::move(ranges)),
        decoders_(std::move(decoders)),
        read_(std::move(read)),
        alignment_(options.alignment) {
    nbytes_ = disk_buffer_bytes(ranges_, options, decoders_);
    const std::int64_t largest = largest_buffer(ranges_, alignment_, decoders_);
    memory_ = allocate_pages(static_cast<std::size_t>(nbytes_));
    const auto unit = static_cast<std::uintptr_t>(alignment_);
    const auto first = (reinterpret_cast<std::uintptr_t>(memory_.get()) + unit - 1) / unit * unit;
    buffers_.resize(static_cast<std::size_t>(options.buffers));
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      buffers_[i].memory =
          reinterpret_cast<std::byte*>(first) + static_cast<std::int64_t>(i) * largest;
    }
    // Signals are the business of the application's own threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (std::int32_t i = 0; i < options.threads; ++i) {
        threads_.emplace_back([this] { work(); });
      }
    } catch (const std::system_error& error) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      stop();
      throw DeviceError(Problem{.operation = "MoeExpertStore",
                                .what = "io_threads",
                                .expected = std::to_string(options.threads) + " threads",
                                .got = error.what(),
                                .hint = "lower the number of threads or raise the process limit"});
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      stop();
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    watch();
  }

  ~DiskSource() override {
    unwatch();
    stop();
  }

  /// Forgets the threads, which the child lacks, and whoever waited for them. What they were reading
  /// never arrives.
  void forked() noexcept override {
    forked_ = true;
    // Neither joined nor destroyed: both would wait for threads that are not there.
    new (&threads_) std::vector<std::thread>();
    new (&work_) std::condition_variable_any();
    new (&changed_) std::condition_variable_any();
  }

  std::int32_t batch_limit() const override { return static_cast<std::int32_t>(buffers_.size()); }
  std::int64_t nbytes() const override { return nbytes_; }
  IoStats stats() const override {
    const std::lock_guard lock(mutex_);
    IoStats stats = stats_;
    stats.guessing = !gauge_.paused();
    return stats;
  }

  std::unique_ptr<ExpertBatch> open(std::int32_t layer,
                                    std::span<const std::int32_t> experts) override {
    // Before the lock, since it gives back its leases when the rest fails.
    auto batch = std::make_unique<Batch>(*this, layer, experts.size());
    std::unique_lock lock(mutex_);
    require_own_process();
    drop_queued(layer, experts, Expect::Guessed);
    if (!can_lease(layer, experts)) drop_queued(layer, experts, Expect::Told);
    wait_until(lock, [&] { return can_lease(layer, experts); });
    // Experts that are there are leased first, so that no other expert takes their buffers.
    for (std::size_t i = 0; i < experts.size(); ++i) {
      Buffer*& buffer = batch->buffers[i];
      buffer = find(layer, experts[i]);
      if (buffer != nullptr) ++buffer->leases;
    }
    for (std::size_t i = 0; i < experts.size(); ++i) {
      Buffer*& buffer = batch->buffers[i];
      if (buffer != nullptr) {
        ++stats_.cached;
        batch->joined[i] = buffer->pending > 0;
        settle_ahead(*buffer, true);
        hasten(*buffer);
      } else {
        buffer = oldest_idle();
        ++buffer->leases;
        read_into(*buffer, layer, experts[i], demand_);
      }
      buffer->used_at = ++clock_;
    }
    lock.unlock();
    work_.notify_all();
    return batch;
  }

  void expect(std::int32_t layer, std::span<const std::int32_t> experts, Expect how_sure) override {
    {
      const std::lock_guard lock(mutex_);
      if (forked_ || (how_sure == Expect::Guessed && !gauge_.listening())) return;
      if (how_sure == Expect::Needed) drop_queued(layer, experts, Expect::Guessed);
      for (const std::int32_t expert : experts) {
        if (Buffer* const present = find(layer, expert); present != nullptr) {
          present->used_at = ++clock_;  // so that none of the others takes its place
          if (how_sure == Expect::Needed) hasten(*present);
          continue;
        }
        Buffer* const buffer =
            how_sure == Expect::Needed || may_read_ahead() ? oldest_idle() : nullptr;
        if (buffer == nullptr) break;
        read_into(*buffer, layer, expert, how_sure == Expect::Needed ? demand_ : ahead_);
        buffer->used_at = ++clock_;
        if (how_sure == Expect::Needed) continue;
        buffer->ahead = how_sure;
        ++stats_.ahead;
      }
    }
    work_.notify_all();
  }

 private:
  void require_own_process() const {
    require<DeviceError>(!forked_, [] {
      return Problem{.operation = "MoeExpertStore",
                     .what = "process",
                     .expected = "the one that opened the store",
                     .got = "a forked child, which has none of its threads",
                     .hint = "open the store in the child, or start children with spawn"};
    });
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  struct Batch final : ExpertBatch {
    Batch(DiskSource& from, std::int32_t of_layer, std::size_t experts)
        : source(from), layer(of_layer), buffers(experts, nullptr), joined(experts, false) {}
    ~Batch() override {
      {
        const std::lock_guard lock(source.mutex_);
        for (Buffer* buffer : buffers) {
          if (buffer != nullptr) --buffer->leases;
        }
      }
      source.changed_.notify_all();
    }
    ExpertBytes wait(std::size_t i) override { return source.wait(*buffers[i], joined[i]); }
    bool ready(std::size_t i) override {
      const std::lock_guard lock(source.mutex_);
      return buffers[i]->pending == 0;
    }

    DiskSource& source;
    std::int32_t layer;
    std::vector<Buffer*> buffers;  ///< leased ones; null where none is yet
    std::vector<char> joined;      ///< whether somebody else had begun to read it
  };

  Buffer* find(std::int32_t layer, std::int32_t expert) {
    const auto found = std::ranges::find_if(buffers_, [&](const Buffer& b) {
      return b.layer == layer && b.expert == expert && b.error == nullptr;
    });
    return found == buffers_.end() ? nullptr : &*found;
  }

  Buffer* oldest_idle() {
    Buffer* oldest = nullptr;
    for (Buffer& buffer : buffers_) {
      if (!buffer.idle()) continue;
      if (oldest == nullptr || buffer.used_at < oldest->used_at) oldest = &buffer;
    }
    return oldest;
  }

  /// Whether every expert has a buffer or could get an idle one.
  bool can_lease(std::int32_t layer, std::span<const std::int32_t> experts) {
    std::ptrdiff_t missing = 0;
    auto idle = std::ranges::count_if(buffers_, [](const Buffer& b) { return b.idle(); });
    for (const std::int32_t expert : experts) {
      const Buffer* const buffer = find(layer, expert);
      if (buffer == nullptr) {
        ++missing;
      } else if (buffer->idle()) {
        --idle;
      }
    }
    return missing <= idle;
  }

  /// Whether another buffer may hold an expert that nobody has asked for yet: half of them at most.
  bool may_read_ahead() const {
    const auto unused =
        std::ranges::count_if(buffers_, [](const Buffer& b) { return b.ahead.has_value(); });
    return 2 * (unused + 1) <= static_cast<std::ptrdiff_t>(buffers_.size());
  }

  /// The end of a read ahead: its expert was asked for, or its buffer goes to another.
  void settle_ahead(Buffer& buffer, bool used) {
    if (!buffer.ahead) return;
    if (used) ++stats_.ahead_used;
    if (buffer.ahead == Expect::Guessed) gauge_.judge(used);
    buffer.ahead.reset();
  }

  void read_into(Buffer& buffer, std::int32_t layer, std::int32_t expert,
                 std::deque<Piece>& queue) {
    settle_ahead(buffer, false);
    buffer.layer = buffer.expert = -1;  // until all of it is queued
    buffer.error = nullptr;
    const ExpertRanges& ranges = ranges_of(layer, expert);
    Windows windows;
    windows_of(ranges, alignment_, windows);
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      const Window& window = windows[i];
      for (std::int64_t done = 0; done < window.bytes; done += kPiece) {
        const std::int64_t bytes = std::min(kPiece, window.bytes - done);
        queue.push_back({&buffer,
                         {ranges[i].file, window.offset + static_cast<std::uint64_t>(done), bytes},
                         buffer.memory + window.at + done});
        ++buffer.pending;
      }
    }
    buffer.layer = layer;
    buffer.expert = expert;
  }

  /// Moves the queued pieces of a buffer to the demand queue: somebody waits for it now.
  void hasten(Buffer& buffer) {
    if (buffer.pending == 0) return;
    const auto first = std::stable_partition(ahead_.begin(), ahead_.end(),
                                             [&](const Piece& p) { return p.buffer != &buffer; });
    demand_.insert(demand_.end(), first, ahead_.end());
    ahead_.erase(first, ahead_.end());
  }

  /// Frees the buffers of reads ahead of this kind that have not begun, except for `experts`. Nobody
  /// learns whether they would have been of use.
  void drop_queued(std::int32_t layer, std::span<const std::int32_t> experts, Expect kind) {
    const auto dropped = [&](const Buffer& buffer) {
      const bool wanted =
          buffer.layer == layer && std::ranges::find(experts, buffer.expert) != experts.end();
      return buffer.ahead == kind && !wanted;
    };
    // All pieces of a buffer see the same, so what they are told by is reset behind the queue.
    std::erase_if(ahead_, [&](const Piece& piece) {
      if (!dropped(*piece.buffer)) return false;
      --piece.buffer->pending;
      piece.buffer->incomplete = true;
      return true;
    });
    for (Buffer& buffer : buffers_) {
      if (!buffer.incomplete) continue;
      buffer.incomplete = false;
      buffer.layer = buffer.expert = -1;
      buffer.ahead.reset();
    }
  }

  /// Waits for a change that makes `done` true. An interrupt ends the call: reads go on, for whoever
  /// wants these experts next.
  template <class Done>
  void wait_until(std::unique_lock<LeafMutex>& lock, Done&& done) {
    if (Interrupt::current() == nullptr) {
      changed_.wait(lock, done);
      return;
    }
    while (!changed_.wait_for(lock, Interrupt::kInterval, done)) {
      lock.unlock();  // whoever is asked may run code of the application
      Interrupt::check();
      lock.lock();
    }
  }

  /// A read that was begun before its expert was asked for may fail for what has passed since, such
  /// as a file that had not been written yet: it is read again, and an error of that one counts.
  ExpertBytes wait(Buffer& buffer, bool joined) {
    std::unique_lock lock(mutex_);
    require_own_process();
    const auto arrived = [&] { return buffer.pending == 0; };
    wait_until(lock, arrived);
    if (joined && buffer.error != nullptr) {
      read_into(buffer, buffer.layer, buffer.expert, demand_);
      work_.notify_all();
      wait_until(lock, arrived);
    }
    if (buffer.error != nullptr) std::rethrow_exception(buffer.error);
    return buffer.roles;
  }

  /// Where the roles of an expert are whose pieces were read into a buffer, after they were decoded.
  ExpertBytes roles_of(const Buffer& buffer) const {
    const ExpertRanges& ranges = ranges_of(buffer.layer, buffer.expert);
    Windows windows;
    const std::int64_t end = windows_of(ranges, alignment_, windows);
    PieceBytes pieces{};
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      if (ranges[i].bytes != 0) pieces[i] = buffer.memory + windows[i].at + windows[i].skip;
    }
    if (decoders_.empty()) return {pieces[0], pieces[1], pieces[2]};
    return decoders_[static_cast<std::size_t>(buffer.layer)]->decode(buffer.expert, pieces,
                                                                     buffer.memory + end);
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return stop_ || !demand_.empty() || !ahead_.empty(); });
      if (stop_) return;
      std::deque<Piece>& queue = demand_.empty() ? ahead_ : demand_;
      const Piece piece = queue.front();
      queue.pop_front();
      stats_.most_in_flight = std::max(stats_.most_in_flight, ++in_flight_);
      lock.unlock();
      std::exception_ptr error;
      try {
        read_(piece.range.file, piece.range.offset,
              {piece.to, static_cast<std::size_t>(piece.range.bytes)});
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      --in_flight_;
      ++stats_.reads;
      stats_.bytes += piece.range.bytes;
      if (error != nullptr) piece.buffer->error = error;
      if (piece.buffer->pending == 1) finish(*piece.buffer, lock);
      if (--piece.buffer->pending == 0) changed_.notify_all();
    }
  }

  /// What remains to be done where the last piece of a buffer has arrived, without the lock: nobody
  /// else touches a buffer with pieces that are pending.
  void finish(Buffer& buffer, std::unique_lock<LeafMutex>& lock) {
    if (buffer.expert < 0 || buffer.error != nullptr) return;  // dropped, or not whole
    lock.unlock();
    std::exception_ptr error;
    ExpertBytes roles{};
    try {
      roles = roles_of(buffer);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    buffer.roles = roles;
    buffer.error = error;
  }

  const ExpertRanges& ranges_of(std::int32_t layer, std::int32_t expert) const {
    return ranges_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(expert)];
  }

  const std::vector<std::vector<ExpertRanges>> ranges_;
  const Decoders decoders_;
  const ReadFn read_;
  const std::int64_t alignment_;
  std::int64_t nbytes_ = 0;
  std::shared_ptr<std::byte> memory_;
  mutable LeafMutex mutex_;
  std::condition_variable_any work_;     ///< wakes I/O threads: something is queued
  std::condition_variable_any changed_;  ///< wakes their callers: a buffer is full or free
  std::vector<Buffer> buffers_;
  std::deque<Piece> demand_, ahead_;
  GuessGauge gauge_;
  std::uint64_t clock_ = 0;
  std::int64_t in_flight_ = 0;
  bool stop_ = false;
  bool forked_ = false;  ///< in a child of the process that has the threads
  IoStats stats_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::int64_t largest_expert(const std::vector<std::vector<ExpertRanges>>& ranges,
                            const Decoders& decoders) {
  return largest_buffer(ranges, 1, decoders);
}

std::int64_t disk_buffer_bytes(const std::vector<std::vector<ExpertRanges>>& ranges,
                               const DiskOptions& options, const Decoders& decoders) {
  // The memory itself may begin between two units.
  const std::int64_t to_align = options.alignment > kAlignment ? options.alignment : 0;
  const std::int64_t bytes =
      largest_buffer(ranges, options.alignment, decoders) * options.buffers + to_align;
  return static_cast<std::int64_t>(allocated_bytes(static_cast<std::size_t>(bytes)));
}

std::unique_ptr<ExpertSource> make_disk_source(std::vector<std::vector<ExpertRanges>> ranges,
                                               ReadFn read, const DiskOptions& options,
                                               Decoders decoders) {
  return std::make_unique<DiskSource>(std::move(ranges), std::move(read), options,
                                      std::move(decoders));
}

}  // namespace moesaic::offload
