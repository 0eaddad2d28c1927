// The disk tier. A few buffers, each large enough for one expert, are filled by threads that call
// pread. An expert is cut into pieces, so that several requests are in flight even for a single
// one; page faults of a mapping would keep less than one in flight. Reads that a forward waits for
// go before reads ahead.
//
//   open ──> demand queue ─┐                 ┌─> buffer: reading ─> ready ─> leased ─> cached (LRU)
//   expect ─> ahead queue ─┴─> I/O threads ──┘

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <new>
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
/// Large enough that a request costs little beside its bytes, small enough to share an expert.
constexpr std::int64_t kPiece = std::int64_t{1} << 20;

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct Buffer {
  std::byte* memory = nullptr;
  std::int32_t layer = -1, expert = -1;  ///< -1: it holds no expert
  std::int32_t pending = 0;              ///< pieces not read yet
  std::int32_t leases = 0;
  bool ahead = false;  ///< read ahead and not asked for yet
  std::uint64_t used_at = 0;
  std::exception_ptr error;
  bool idle() const { return pending == 0 && leases == 0; }
};

struct Piece {
  Buffer* buffer;
  FileRange range;
  std::byte* to;
};

class DiskSource final : public ExpertSource, private ForkHook {
 public:
  DiskSource(std::vector<std::vector<ExpertRanges>> ranges, ReadFn read, const DiskOptions& options)
      : ranges_(std::move(ranges)), read_(std::move(read)) {
    std::int64_t largest = 0;
    for (const auto& layer : ranges_) {
      for (const ExpertRanges& expert : layer) {
        std::int64_t bytes = 0;
        for (const FileRange& range : expert) bytes += aligned(range.bytes);
        largest = std::max(largest, bytes);
      }
    }
    nbytes_ = largest * options.buffers;
    memory_ = allocate_pages(static_cast<std::size_t>(nbytes_));
    buffers_.resize(static_cast<std::size_t>(options.buffers));
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      buffers_[i].memory = memory_.get() + static_cast<std::int64_t>(i) * largest;
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
    return stats_;
  }

  std::unique_ptr<ExpertBatch> open(std::int32_t layer,
                                    std::span<const std::int32_t> experts) override {
    // Before the lock, since it gives back its leases when the rest fails.
    auto batch = std::make_unique<Batch>(*this, layer, experts.size());
    std::unique_lock lock(mutex_);
    require_own_process();
    drop_queued_ahead(layer, experts);
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
        if (buffer->ahead) ++stats_.ahead_used;
        buffer->ahead = false;
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

  void expect(std::int32_t layer, std::span<const std::int32_t> experts) override {
    {
      const std::lock_guard lock(mutex_);
      if (forked_) return;
      auto unused = std::ranges::count_if(buffers_, [](const Buffer& b) { return b.ahead; });
      for (const std::int32_t expert : experts) {
        if (2 * (unused + 1) > static_cast<std::ptrdiff_t>(buffers_.size())) break;
        if (find(layer, expert) != nullptr) continue;
        Buffer* const buffer = oldest_idle();
        if (buffer == nullptr) break;
        read_into(*buffer, layer, expert, ahead_);
        buffer->ahead = true;
        buffer->used_at = ++clock_;
        ++stats_.ahead;
        ++unused;
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
        : source(from), layer(of_layer), buffers(experts, nullptr) {}
    ~Batch() override {
      {
        const std::lock_guard lock(source.mutex_);
        for (Buffer* buffer : buffers) {
          if (buffer != nullptr) --buffer->leases;
        }
      }
      source.changed_.notify_all();
    }
    ExpertBytes wait(std::size_t i) override { return source.wait(*buffers[i], layer); }

    DiskSource& source;
    std::int32_t layer;
    std::vector<Buffer*> buffers;  ///< leased ones; null where none is yet
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

  void read_into(Buffer& buffer, std::int32_t layer, std::int32_t expert,
                 std::deque<Piece>& queue) {
    buffer.layer = buffer.expert = -1;  // until all of it is queued
    buffer.ahead = false;
    buffer.error = nullptr;
    std::byte* to = buffer.memory;
    for (const FileRange& range : ranges_of(layer, expert)) {
      for (std::int64_t done = 0; done < range.bytes; done += kPiece) {
        const std::int64_t bytes = std::min(kPiece, range.bytes - done);
        queue.push_back({&buffer,
                         {range.file, range.offset + static_cast<std::uint64_t>(done), bytes},
                         to + done});
        ++buffer.pending;
      }
      to += aligned(range.bytes);
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

  /// Frees the buffers of reads ahead that have not begun, except for `experts`.
  void drop_queued_ahead(std::int32_t layer, std::span<const std::int32_t> experts) {
    std::erase_if(ahead_, [&](const Piece& piece) {
      Buffer& buffer = *piece.buffer;
      const bool wanted =
          buffer.layer == layer && std::ranges::find(experts, buffer.expert) != experts.end();
      if (wanted) return false;
      --buffer.pending;
      buffer.layer = buffer.expert = -1;  // so that its other pieces go too
      buffer.ahead = false;
      return true;
    });
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

  ExpertBytes wait(Buffer& buffer, std::int32_t layer) {
    std::unique_lock lock(mutex_);
    require_own_process();
    wait_until(lock, [&] { return buffer.pending == 0; });
    if (buffer.error != nullptr) std::rethrow_exception(buffer.error);
    ExpertBytes bytes{};
    std::byte* at = buffer.memory;
    const ExpertRanges& ranges = ranges_of(layer, buffer.expert);
    for (std::size_t role = 0; role < ranges.size(); ++role) {
      if (ranges[role].bytes > 0) bytes[role] = at;
      at += aligned(ranges[role].bytes);
    }
    return bytes;
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
      if (--piece.buffer->pending == 0) changed_.notify_all();
    }
  }

  const ExpertRanges& ranges_of(std::int32_t layer, std::int32_t expert) const {
    return ranges_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(expert)];
  }

  const std::vector<std::vector<ExpertRanges>> ranges_;
  const ReadFn read_;
  std::int64_t nbytes_ = 0;
  std::shared_ptr<std::byte> memory_;
  mutable LeafMutex mutex_;
  std::condition_variable_any work_;     ///< wakes I/O threads: something is queued
  std::condition_variable_any changed_;  ///< wakes their callers: a buffer is full or free
  std::vector<Buffer> buffers_;
  std::deque<Piece> demand_, ahead_;
  std::uint64_t clock_ = 0;
  std::int64_t in_flight_ = 0;
  bool stop_ = false;
  bool forked_ = false;  ///< in a child of the process that has the threads
  IoStats stats_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<ExpertSource> make_disk_source(std::vector<std::vector<ExpertRanges>> ranges,
                                               ReadFn read, const DiskOptions& options) {
  return std::make_unique<DiskSource>(std::move(ranges), std::move(read), options);
}

}  // namespace moesaic::offload
