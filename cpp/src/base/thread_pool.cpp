#include "moesaic/thread_pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <string>
#include <vector>

#include "base/float_state.hpp"
#include "base/fork.hpp"
#include "base/futex.hpp"
#include "moesaic/error.hpp"
#include "moesaic/interrupt.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

namespace moesaic {
namespace {

/// How long a thread spins for work, or for the last chunk of another thread, before it sleeps:
/// longer than the gap between two steps of a forward, shorter than a time slice that others could
/// use.
constexpr auto kSpinTime = std::chrono::microseconds(40);
/// A thread wakes this many sleepers, and each of them as many more, so that no thread pays for
/// all.
constexpr int kWakeFan = 2;
/// Chunks per round: the ticket has 32 bits, and `pending` keeps one for the sleep flag.
constexpr std::int64_t kMaxRound = 0x7fffffff;
constexpr std::uint32_t kCallerSleeps = 0x80000000U;
constexpr std::size_t kCacheLine = 64;

/// A ticket holds the number of the call in its upper half and the chunks not yet taken in its
/// lower.
constexpr std::uint64_t kCallStep = std::uint64_t{1} << 32;
constexpr std::uint32_t untaken(std::uint64_t ticket) { return static_cast<std::uint32_t>(ticket); }

/// Spins until `done()` or until kSpinTime has passed; returns whether it was done.
template <class Done>
bool spin_until(Done&& done) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      cpu_pause();
    }
  } while (Clock::now() < deadline);
  return done();
}

/// The CPUs of the calling thread in ascending order, empty where the system does not tell.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
    }
  }
#endif
  return cpus;
}

/// Moves the calling thread to `cpu`, then lets it roam again: new threads often start on the core
/// of their parent and stay there for milliseconds.
void visit_cpu([[maybe_unused]] int cpu) {
#if defined(__linux__)
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof(all), &all) != 0) return;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  if (sched_setaffinity(0, sizeof(one), &one) == 0) sched_setaffinity(0, sizeof(all), &all);
#endif
}

}  // namespace

/// One call at a time owns the workers (`busy`). It publishes its body and then a ticket; whoever
/// takes a chunk does so by decrementing the ticket, which fails once the call is over, so a worker
/// that wakes late can neither delay a call nor touch a finished one.
struct ThreadPool::Impl final : ForkHook {
  explicit Impl(int count) : num_threads(count) {}
  using ForkHook::unwatch;
  using ForkHook::watch;

  const int num_threads;
  std::vector<pthread_t> workers;  ///< those running in this process
  std::vector<int> cpus;           ///< where workers start
  bool lost_workers = false;       ///< in a forked child whose workers have not been started

  alignas(kCacheLine) std::atomic<std::uint64_t> ticket{0};
  std::atomic<Invoke> invoke{nullptr};
  std::atomic<void*> body{nullptr};
  std::atomic<std::int64_t> first{0};   ///< chunk that ticket `round` stands for
  std::atomic<std::uint32_t> round{0};  ///< chunks of this round
  /// The caller's, for all chunks, so that results do not depend on who computes them.
  std::atomic<FloatState> floats{0};
  std::atomic<bool> cancelled{false};  ///< the call was interrupted: chunks are taken, not run

  /// Chunks of the round that are not done, and in its top bit kCallerSleeps.
  alignas(kCacheLine) std::atomic<std::uint32_t> pending{0};

  alignas(kCacheLine) std::atomic<bool> busy{false};
  std::atomic<bool> stop{false};
  std::atomic<std::int32_t> sleepers{0};
  std::atomic<std::uint32_t> wakeups{0};  ///< the word that workers sleep on

  /// Which pools the current thread is inside of, innermost first.
  struct Frame {
    const Impl* pool;
    int thread;
    const Frame* outer;
  };
  static thread_local const Frame* frames;
  class Enter {
   public:
    Enter(const Impl* pool, int thread) : frame_{pool, thread, frames} { frames = &frame_; }
    ~Enter() { frames = frame_.outer; }
    Enter(const Enter&) = delete;
    Enter& operator=(const Enter&) = delete;

   private:
    Frame frame_;
  };
  const Frame* innermost() const {
    const Frame* frame = frames;
    while (frame != nullptr && frame->pool != this) frame = frame->outer;
    return frame;
  }

  struct Registry;

  struct Start {
    Impl* pool;
    int thread;
  };
  std::vector<Start> starts;

  static void* enter_worker(void* argument) {
    const Start start = *static_cast<const Start*>(argument);
    start.pool->work(start.thread);
    return nullptr;
  }

  /// Starts workers 1..threads-1; the errno value of the first that failed, or 0.
  int start_workers() {
    cpus = allowed_cpus();
#if defined(__linux__)
    // The caller keeps its CPU; the workers take the ones after it.
    const auto here = std::ranges::find(cpus, sched_getcpu());
    if (here != cpus.end()) std::ranges::rotate(cpus, here);
#endif
    starts.clear();
    for (int i = 1; i < num_threads; ++i) starts.push_back({this, i});
    workers.clear();
    workers.reserve(starts.size());
    // Workers inherit the mask: signals are the business of the application's own threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (std::size_t i = 0; i < starts.size() && error == 0; ++i) {
      pthread_t id;
      error = pthread_create(&id, nullptr, enter_worker, &starts[i]);
      if (error == 0) workers.push_back(id);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return error;
  }

  void stop_workers() {
    stop.store(true, std::memory_order_seq_cst);
    wakeups.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(wakeups, num_threads);
    for (const pthread_t id : workers) pthread_join(id, nullptr);
    workers.clear();
  }

  /// Forgets the workers. A call that this thread itself is inside of, by way of a signal handler
  /// that forks, lacks the chunks that others had: it ends as an interrupted one.
  void forked() noexcept override {
    const bool inside = innermost() != nullptr;
    workers.clear();
    lost_workers = true;
    ticket.store(0);
    pending.store(inside ? 1 : 0);
    cancelled.store(inside);
    busy.store(inside);
    sleepers.store(0);
  }

  /// `interrupt` is that of the caller, which alone may ask it.
  void take_chunks(int thread, Interrupt* interrupt = nullptr) {
    std::uint64_t seen = ticket.load(std::memory_order_acquire);
    while (untaken(seen) != 0) {
      // These five belong together if the exchange below succeeds, because they change only while
      // no chunk is left to take.
      const Invoke call = invoke.load(std::memory_order_relaxed);
      void* const context = body.load(std::memory_order_relaxed);
      const std::int64_t begin = first.load(std::memory_order_relaxed);
      const std::uint32_t size = round.load(std::memory_order_relaxed);
      const FloatState state = floats.load(std::memory_order_relaxed);
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        continue;
      }
      set_float_state(state);
      if (!cancelled.load(std::memory_order_relaxed))
        call(context, begin + (size - untaken(seen)), thread);
      if (interrupt != nullptr && interrupt->due()) cancelled.store(true);
      if (pending.fetch_sub(1, std::memory_order_acq_rel) == (kCallerSleeps | 1)) {
        futex_wake(pending, 1);
      }
      seen = ticket.load(std::memory_order_acquire);
    }
  }

  bool wanted(std::memory_order order) const {
    return untaken(ticket.load(order)) != 0 || stop.load(order);
  }

  void work(int thread) {
    if (!cpus.empty()) visit_cpu(cpus[static_cast<std::size_t>(thread) % cpus.size()]);
    const Enter enter(this, thread);
    while (!stop.load(std::memory_order_acquire)) {
      take_chunks(thread);
      if (spin_until([this] { return wanted(std::memory_order_relaxed); })) continue;
      const std::uint32_t seen = wakeups.load(std::memory_order_seq_cst);
      sleepers.fetch_add(1, std::memory_order_seq_cst);
      if (!wanted(std::memory_order_seq_cst)) futex_wait(wakeups, seen);
      sleepers.fetch_sub(1, std::memory_order_seq_cst);
      wake(untaken(ticket.load(std::memory_order_relaxed)));
    }
  }

  /// Wakes a few sleepers for `chunks` chunks.
  void wake(std::int64_t chunks) {
    const std::int64_t asleep = sleepers.load(std::memory_order_seq_cst);
    const std::int64_t count = std::min({chunks, asleep, std::int64_t{kWakeFan}});
    if (count <= 0) return;
    wakeups.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(wakeups, static_cast<int>(count));
  }

  void run_round(std::int64_t begin, std::uint32_t size, Invoke call, void* context,
                 Interrupt* interrupt) {
    invoke.store(call, std::memory_order_relaxed);
    body.store(context, std::memory_order_relaxed);
    first.store(begin, std::memory_order_relaxed);
    round.store(size, std::memory_order_relaxed);
    floats.store(float_state(), std::memory_order_relaxed);
    pending.store(size, std::memory_order_relaxed);
    const std::uint64_t last = ticket.load(std::memory_order_relaxed);
    // Sequentially consistent with the sleepers' count: a worker sees this ticket or is seen
    // asleep.
    ticket.store(((last & ~(kCallStep - 1)) + kCallStep) | size, std::memory_order_seq_cst);
    wake(std::int64_t{size} - 1);
    take_chunks(0, interrupt);
    const auto finished = [this] { return pending.load(std::memory_order_acquire) == 0; };
    if (finished() || spin_until(finished)) return;
    // The thread that holds the last chunk may wait for this very CPU.
    std::uint32_t left = pending.fetch_or(kCallerSleeps, std::memory_order_acq_rel) | kCallerSleeps;
    while (left != kCallerSleeps) {
      futex_wait(pending, left);
      left = pending.load(std::memory_order_acquire);
    }
  }
};

constinit thread_local const ThreadPool::Impl::Frame* ThreadPool::Impl::frames = nullptr;

/// The pools that contexts share; never destroyed, since workers may outlive static destructors.
struct ThreadPool::Impl::Registry {
  LeafMutex mutex;
  std::map<int, std::weak_ptr<ThreadPool>> shared;
  std::shared_ptr<ThreadPool> latest;  ///< kept alive between contexts

  static Registry& get() {
    static Registry& registry = *new Registry;
    return registry;
  }
};

ThreadPool::ThreadPool(int threads) {
  require<ConfigError>(threads >= 0, [&] {
    return Problem{"ThreadPool", "threads", "0 (all available CPUs) or more",
                   std::to_string(threads), ""};
  });
  impl_ = std::make_unique<Impl>(threads == 0 ? available_cpus() : threads);
  {
    // A fork between the start of a worker and watch() would leave the child waiting for it.
    const std::lock_guard lock(Impl::Registry::get().mutex);
    if (const int error = impl_->start_workers(); error != 0) {
      const std::size_t started = impl_->workers.size() + 1;
      impl_->stop_workers();
      throw DeviceError(Problem{"ThreadPool", "threads", std::to_string(impl_->num_threads),
                                std::to_string(started) + ", then error " + std::to_string(error),
                                "lower the number of threads or raise the process limit"});
    }
    impl_->watch();
  }
}

ThreadPool::~ThreadPool() {
  impl_->unwatch();
  impl_->stop_workers();
}

int ThreadPool::threads() const noexcept { return impl_->num_threads; }

void ThreadPool::run(std::int64_t chunks, Invoke invoke, void* body) {
  Impl& pool = *impl_;
  const Impl::Frame* const outer = pool.innermost();
  // A body must not throw, so what runs inside of one leaves an interrupt to the outer call.
  Interrupt* const interrupt = Impl::frames == nullptr ? Interrupt::current() : nullptr;
  const bool alone = chunks <= 1 || pool.num_threads == 1 || outer != nullptr ||
                     pool.busy.exchange(true, std::memory_order_acquire);
  if (alone) {
    const int thread = outer != nullptr ? outer->thread : 0;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (interrupt != nullptr && interrupt->due()) Interrupt::cancel();
      invoke(body, chunk, thread);
    }
    return;
  }
  if (pool.lost_workers) [[unlikely]] {
    pool.lost_workers = false;
    pool.start_workers();  // fewer of them, if some fail, only take longer
  }
  // Workers may be quick enough to leave no chunk to the caller, which alone looks.
  pool.cancelled.store(interrupt != nullptr && interrupt->due(), std::memory_order_relaxed);
  {
    const Impl::Enter enter(&pool, 0);
    for (std::int64_t first = 0; first < chunks && !pool.cancelled.load(); first += kMaxRound) {
      pool.run_round(first, static_cast<std::uint32_t>(std::min(kMaxRound, chunks - first)), invoke,
                     body, interrupt);
    }
  }
  const bool cancelled = pool.cancelled.load();
  pool.busy.store(false, std::memory_order_release);
  if (cancelled) Interrupt::cancel();
}

std::shared_ptr<ThreadPool> ThreadPool::shared(int threads) {
  // Counting reads files of the cgroup: once, not for every context.
  static const int available = available_cpus();
  const int count = threads == 0 ? available : threads;
  auto& registry = Impl::Registry::get();
  std::shared_ptr<ThreadPool> pool;
  std::shared_ptr<ThreadPool> spare;
  std::shared_ptr<ThreadPool> released;  // pools die after the lock, which their destructor takes
  const auto find = [&] {
    std::weak_ptr<ThreadPool>& slot = registry.shared[count];
    pool = slot.lock();
    if (pool == nullptr && spare != nullptr) slot = pool = spare;
    if (pool != nullptr) released = std::exchange(registry.latest, pool);
  };
  {
    const std::lock_guard lock(registry.mutex);
    find();
  }
  if (pool == nullptr) {
    spare = std::make_shared<ThreadPool>(count);
    const std::lock_guard lock(registry.mutex);
    find();
  }
  return pool;
}

}  // namespace moesaic
