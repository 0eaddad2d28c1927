#include "moesaic/thread_pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/float_state.hpp"
#include "base/fork.hpp"
#include "base/futex.hpp"
#include "base/openmp.hpp"
#include "base/topology.hpp"
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
/// Threads that take chunks from one ticket; more of them would wait for its cache line.
constexpr int kLaneThreads = 8;
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

/// Spins until `done()` or until `time` has passed; returns whether it was done.
template <class Done>
bool spin_until(std::chrono::microseconds time, Done&& done) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + time;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      cpu_pause();
    }
  } while (Clock::now() < deadline);
  return done();
}

/// Moves the calling thread to `cpu`, then lets it roam again: new threads often start on the core
/// of their parent and stay there for milliseconds.
void visit_cpu([[maybe_unused]] std::int32_t cpu) {
#if defined(__linux__)
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof(all), &all) != 0) return;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  if (sched_setaffinity(0, sizeof(one), &one) == 0) sched_setaffinity(0, sizeof(all), &all);
#endif
}

/// Keeps the calling thread on those of `cpus` that it may use. Where the system refuses, memory is
/// further away, no more.
void stay_on([[maybe_unused]] const std::vector<std::int32_t>& cpus) {
#if defined(__linux__)
  cpu_set_t mask;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  CPU_ZERO(&mask);
  for (const std::int32_t cpu : cpus) CPU_SET(cpu, &mask);
  CPU_AND(&mask, &mask, &allowed);
  sched_setaffinity(0, sizeof(mask), &mask);
#endif
}

std::int32_t current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

}  // namespace

/// One call at a time owns the workers (`busy`). Its chunks are dealt to lanes: some threads of one
/// node each, so that no cache line is written by all. The call publishes its body and then the
/// lanes' tickets; whoever takes a chunk does so by decrementing a ticket, which fails once the call
/// is over, so a worker that wakes late can neither delay a call nor touch a finished one. Threads
/// count the chunks that they have done and arrive at the lane when it has none left; the last to
/// arrive there arrives at the call.
struct ThreadPool::Impl final : ForkHook {
  Impl(int count, Topology places, std::chrono::microseconds wait)
      : num_threads(count),
        topology(std::move(places)),
        helps(topology.nodes.size() > 1 && wait <= kSpinTime),
        patience(helps ? wait : kSpinTime) {}
  using ForkHook::unwatch;
  using ForkHook::watch;

  struct Lane {
    alignas(kCacheLine) std::atomic<std::uint64_t> ticket{0};
    std::atomic<std::int64_t> begin{0};   ///< chunk that ticket `size` stands for
    std::atomic<std::int64_t> stride{1};  ///< from one chunk of the lane to the next
    std::atomic<std::uint32_t> size{0};   ///< chunks of this round
    /// Chunks of the round that nobody has arrived with.
    alignas(kCacheLine) std::atomic<std::uint32_t> pending{0};
    std::atomic<std::int32_t> sleepers{0};
    std::atomic<std::uint32_t> wakeups{0};  ///< the word that workers sleep on
  };
  /// Lanes [first, last) of a node. A node without a thread has one that any thread is near to.
  struct Node {
    std::size_t first, last;
    bool vacant;
  };

  const int num_threads;
  const Topology topology;
  const bool helps;                          ///< whether threads take chunks of other nodes
  const std::chrono::microseconds patience;  ///< for work that is near
  std::vector<Node> nodes;
  std::unique_ptr<Lane[]> lanes;
  /// As many, for threads of an OpenMP runtime: a worker that is still awake must not take a chunk
  /// there, since one of them has the same index.
  std::unique_ptr<Lane[]> team_lanes;
  std::size_t num_lanes = 0;
  std::vector<std::size_t> lane_of;  ///< of each thread
  std::vector<std::size_t> node_of;  ///< of each lane
  std::vector<std::int32_t> node_of_cpu;
  std::vector<pthread_t> workers;   ///< those running in this process
  std::vector<std::int32_t> start;  ///< CPU where each thread starts, -1 for anywhere
  bool lost_workers = false;        ///< in a forked child whose workers have not been started

  alignas(kCacheLine) std::atomic<Invoke> invoke{nullptr};
  std::atomic<void*> body{nullptr};
  /// The caller's, for all chunks, so that results do not depend on who computes them.
  std::atomic<FloatState> floats{0};
  std::atomic<bool> cancelled{false};  ///< the call was interrupted: chunks are taken, not run
  std::atomic<bool> stop{false};

  /// Lanes whose chunks are not done, and in its top bit kCallerSleeps.
  alignas(kCacheLine) std::atomic<std::uint32_t> pending{0};

  alignas(kCacheLine) std::atomic<bool> busy{false};

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

  /// Shares threads and lanes out to the nodes; thread 0, the caller, counts to the one it is on.
  void place_threads() {
    const std::size_t num_nodes = topology.nodes.size();
    for (std::size_t n = 0; n < num_nodes; ++n) {
      for (const std::int32_t cpu : topology.nodes[n].cpus) {
        const auto at = static_cast<std::size_t>(cpu);
        if (at >= node_of_cpu.size()) node_of_cpu.resize(at + 1, 0);
        node_of_cpu[at] = static_cast<std::int32_t>(n);
      }
    }
    std::vector<int> threads_of(num_nodes);
    for (std::size_t n = 0; n < num_nodes; ++n) {
      threads_of[n] = static_cast<int>(topology.first_of(n + 1, num_threads) -
                                       topology.first_of(n, num_threads));
      const int count = std::max(1, (threads_of[n] + kLaneThreads - 1) / kLaneThreads);
      nodes.push_back({num_lanes, num_lanes + static_cast<std::size_t>(count), threads_of[n] == 0});
      num_lanes += static_cast<std::size_t>(count);
      node_of.resize(num_lanes, n);
    }
    lanes = std::make_unique<Lane[]>(num_lanes);
    team_lanes = std::make_unique<Lane[]>(num_lanes);
    const std::size_t here = caller_node();
    const std::size_t first = nodes[here].vacant ? 0 : here;
    for (std::size_t i = 0; i < num_nodes; ++i) {
      const std::size_t n = (first + i) % num_nodes;
      const std::size_t count = nodes[n].last - nodes[n].first;
      for (int t = 0; t < threads_of[n]; ++t) {
        lane_of.push_back(nodes[n].first + static_cast<std::size_t>(t) % count);
      }
    }
  }

  std::size_t caller_node() const {
    if (nodes.size() == 1) return 0;
    const auto cpu = static_cast<std::size_t>(std::max(0, current_cpu()));
    return cpu < node_of_cpu.size() ? static_cast<std::size_t>(node_of_cpu[cpu]) : 0;
  }

  /// The caller works for the node that it is on in this call, unless one of the two would have no
  /// thread then, or has none of its own.
  std::size_t caller_lane() const {
    const std::size_t here = caller_node();
    const std::size_t home = node_of[lane_of[0]];
    const bool needed = lane_of.size() == 1 || node_of[lane_of[1]] != home;
    return here == home || needed || nodes[here].vacant ? lane_of[0] : nodes[here].first;
  }

  /// Chooses where threads start: one on each core before a second one on any, the caller where it
  /// is and the others of its node on the CPUs after it.
  void choose_cpus() {
    const std::vector<std::int32_t> allowed = allowed_cpus();
    start.assign(static_cast<std::size_t>(num_threads), -1);
    for (std::size_t n = 0; n < nodes.size(); ++n) {
      std::vector<std::int32_t> cpus = topology.nodes[n].cpus;
      std::erase_if(
          cpus, [&](std::int32_t cpu) { return std::ranges::find(allowed, cpu) == allowed.end(); });
      if (cpus.empty()) continue;
      const auto here = std::ranges::find(cpus, current_cpu());
      if (here != cpus.end()) std::ranges::rotate(cpus, here);
      std::size_t next = 0;
      for (std::size_t t = 0; t < lane_of.size(); ++t) {
        if (node_of[lane_of[t]] != n) continue;
        start[t] = cpus[next++ % cpus.size()];
      }
    }
  }

  /// Starts workers 1..threads-1; the errno value of the first that failed, or 0.
  int start_workers() {
    choose_cpus();
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
    for (std::size_t i = 0; i < num_lanes; ++i) {
      lanes[i].wakeups.fetch_add(1, std::memory_order_seq_cst);
      futex_wake(lanes[i].wakeups, num_threads);
    }
    for (const pthread_t id : workers) pthread_join(id, nullptr);
    workers.clear();
  }

  /// Forgets the workers. A call that this thread itself is inside of, by way of a signal handler
  /// that forks, lacks the chunks that others had: it ends as an interrupted one.
  void forked() noexcept override {
    const bool inside = innermost() != nullptr;
    workers.clear();
    lost_workers = true;
    for (std::size_t i = 0; i < num_lanes; ++i) {
      for (Lane* const lane : {&lanes[i], &team_lanes[i]}) {
        lane->ticket.store(0);
        lane->pending.store(0);
        lane->sleepers.store(0);
      }
    }
    pending.store(0);
    cancelled.store(inside);
    busy.store(inside);
  }

  /// Runs chunks of a lane until it has none left; whether there was any. `interrupt` is that of the
  /// caller, which alone may ask it.
  bool drain(Lane& lane, int thread, Interrupt* interrupt) {
    std::uint32_t done = 0;
    std::uint64_t seen = lane.ticket.load(std::memory_order_acquire);
    while (untaken(seen) != 0) {
      // These belong together if the exchange below succeeds, because they change only while no
      // chunk is left to take.
      const Invoke call = invoke.load(std::memory_order_relaxed);
      void* const context = body.load(std::memory_order_relaxed);
      const FloatState state = floats.load(std::memory_order_relaxed);
      const std::int64_t begin = lane.begin.load(std::memory_order_relaxed);
      const std::int64_t stride = lane.stride.load(std::memory_order_relaxed);
      const std::uint32_t size = lane.size.load(std::memory_order_relaxed);
      if (!lane.ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
        continue;
      }
      set_float_state(state);
      if (!cancelled.load(std::memory_order_relaxed))
        call(context, begin + (size - untaken(seen)) * stride, thread);
      if (interrupt != nullptr && interrupt->due()) cancelled.store(true);
      ++done;
      seen = lane.ticket.load(std::memory_order_acquire);
    }
    // In a forked child no lane has anything pending, and nobody waits.
    if (done > 0 && lane.pending.fetch_sub(done, std::memory_order_acq_rel) == done &&
        pending.fetch_sub(1, std::memory_order_acq_rel) == (kCallerSleeps | 1)) {
      futex_wake(pending, 1);
    }
    return done > 0;
  }

  /// Runs chunks of lane `own`, of its node's other lanes, and of nodes that have no threads.
  void take_near(std::size_t own, int thread, Interrupt* interrupt = nullptr) {
    const Node& home = nodes[node_of[own]];
    const std::size_t count = home.last - home.first;
    for (std::size_t i = 0; i < count; ++i) {
      drain(lanes[home.first + (own - home.first + i) % count], thread, interrupt);
    }
    for (const Node& node : nodes) {
      if (node.vacant) drain(lanes[node.first], thread, interrupt);
    }
  }

  /// Runs chunks that other nodes' threads have not come to; whether there were any.
  bool take_far(std::size_t own, int thread, Interrupt* interrupt = nullptr) {
    bool any = false;
    for (std::size_t i = 1; i < num_lanes; ++i) {
      any = drain(lanes[(own + i) % num_lanes], thread, interrupt) || any;
    }
    return any;
  }

  bool wanted(const Lane& lane, std::memory_order order) const {
    return untaken(lane.ticket.load(order)) != 0 || stop.load(order);
  }

  void work(int thread) {
    const auto at = static_cast<std::size_t>(thread);
    const std::size_t own = lane_of[at];
    Lane& lane = lanes[own];
    if (start[at] >= 0) visit_cpu(start[at]);
    if (topology.binds() && start[at] >= 0) stay_on(topology.nodes[node_of[own]].cpus);
    const Enter enter(this, thread);
    const auto called = [&] { return wanted(lane, std::memory_order_relaxed); };
    while (!stop.load(std::memory_order_acquire)) {
      take_near(own, thread);
      if (spin_until(patience, called)) continue;
      if (helps && (take_far(own, thread) || spin_until(kSpinTime - patience, called))) continue;
      const std::uint32_t seen = lane.wakeups.load(std::memory_order_seq_cst);
      lane.sleepers.fetch_add(1, std::memory_order_seq_cst);
      if (!wanted(lane, std::memory_order_seq_cst)) futex_wait(lane.wakeups, seen);
      lane.sleepers.fetch_sub(1, std::memory_order_seq_cst);
      wake(own, 0);
    }
  }

  /// Wakes a few sleepers of lanes that have chunks, from lane `own` on; `kept` chunks of that one
  /// need nobody.
  void wake(std::size_t own, std::int64_t kept) {
    std::int64_t fan = kWakeFan;
    for (std::size_t i = 0; i < num_lanes && fan > 0; ++i) {
      Lane& lane = lanes[(own + i) % num_lanes];
      const std::int64_t chunks =
          untaken(lane.ticket.load(std::memory_order_relaxed)) - (i == 0 ? kept : 0);
      const std::int64_t asleep = lane.sleepers.load(std::memory_order_seq_cst);
      const std::int64_t count = std::min({chunks, asleep, fan});
      if (count <= 0) continue;
      lane.wakeups.fetch_add(1, std::memory_order_seq_cst);
      futex_wake(lane.wakeups, static_cast<int>(count));
      fan -= count;
    }
  }

  /// Threads of an OpenMP runtime at the work of one round.
  struct Team {
    Impl* pool;
    const OpenMpRuntime* runtime;
    Interrupt* interrupt;  ///< of the caller, who is thread 0 here and there

    static void enter(void* argument) {
      const Team& team = *static_cast<const Team*>(argument);
      const int thread = team.runtime->thread_num();
      if (thread == 0) return team.pool->take_team(0, team.interrupt);
      const FloatState before = float_state();
      {
        const Enter inside(team.pool, thread);
        team.pool->take_team(thread, nullptr);
      }
      set_float_state(before);
    }
  };

  /// Runs chunks of the team's lanes, the thread's own first.
  void take_team(int thread, Interrupt* interrupt) {
    const std::size_t own = lane_of[static_cast<std::size_t>(thread)];
    for (std::size_t i = 0; i < num_lanes; ++i) {
      drain(team_lanes[(own + i) % num_lanes], thread, interrupt);
    }
  }

  /// The runtime whose threads can work for the caller now. Where it has another number of them, it
  /// would end some and start others in each turn.
  const OpenMpRuntime* team_of_caller() const {
    const OpenMpRuntime* const runtime = openmp_lender();
    const bool usable = runtime != nullptr && nodes.size() == 1 && runtime->in_parallel() == 0 &&
                        runtime->max_threads() == num_threads;
    return usable ? runtime : nullptr;
  }

  /// Chunks of one round: node n has [begin[n], end[n]).
  struct Round {
    std::int64_t begin, end;
  };

  template <class ChunksOf>
  void run_round(const ChunksOf& chunks_of, Invoke call, void* context, Interrupt* interrupt) {
    invoke.store(call, std::memory_order_relaxed);
    body.store(context, std::memory_order_relaxed);
    floats.store(float_state(), std::memory_order_relaxed);
    const OpenMpRuntime* const runtime = team_of_caller();
    Lane* const used = runtime != nullptr ? team_lanes.get() : lanes.get();
    std::uint32_t active = 0;
    for (std::size_t n = 0; n < nodes.size(); ++n) {
      const Round chunks = chunks_of(n);
      const auto count = static_cast<std::int64_t>(nodes[n].last - nodes[n].first);
      // Lanes take turns, so that none has all the long jobs, which come first.
      for (std::int64_t i = 0; i < count; ++i) {
        Lane& lane = used[nodes[n].first + static_cast<std::size_t>(i)];
        const std::int64_t left = chunks.end - chunks.begin - i;
        const std::int64_t size = left > 0 ? (left + count - 1) / count : 0;
        lane.begin.store(chunks.begin + i, std::memory_order_relaxed);
        lane.stride.store(count, std::memory_order_relaxed);
        lane.size.store(static_cast<std::uint32_t>(size), std::memory_order_relaxed);
        lane.pending.store(static_cast<std::uint32_t>(size), std::memory_order_relaxed);
        if (size > 0) ++active;
      }
    }
    pending.store(active, std::memory_order_relaxed);
    for (std::size_t i = 0; i < num_lanes; ++i) {
      Lane& lane = used[i];
      const std::uint32_t size = lane.size.load(std::memory_order_relaxed);
      if (size == 0) continue;
      const std::uint64_t last = lane.ticket.load(std::memory_order_relaxed);
      // Sequentially consistent with the sleepers' count: a worker sees this ticket or is seen
      // asleep.
      lane.ticket.store(((last & ~(kCallStep - 1)) + kCallStep) | size, std::memory_order_seq_cst);
    }
    if (runtime != nullptr) {
      Team team{this, runtime, interrupt};
      runtime->parallel(&Team::enter, &team, static_cast<unsigned>(num_threads), 0);
      // All of them are back, but the runtime may have had fewer threads than it promised.
      return take_team(0, interrupt);
    }
    const std::size_t own = caller_lane();
    wake(own, 1);
    take_near(own, 0, interrupt);
    const auto finished = [this] { return pending.load(std::memory_order_acquire) == 0; };
    if (finished() || spin_until(patience, finished)) return;
    if (helps) {
      take_far(own, 0, interrupt);
      if (finished() || spin_until(kSpinTime - patience, finished)) return;
    }
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
  /// By threads and nodes, as they were asked for.
  std::map<std::pair<int, std::int32_t>, std::weak_ptr<ThreadPool>> shared;
  std::shared_ptr<ThreadPool> latest;  ///< kept alive between contexts

  static Registry& get() {
    static Registry& registry = *new Registry;
    return registry;
  }
};

ThreadPool::ThreadPool(int threads) : ThreadPool(threads, machine_topology(1)) {}

ThreadPool::ThreadPool(int threads, const Topology& topology, std::chrono::microseconds patience) {
  require<ConfigError>(threads >= 0, [&] {
    return Problem{"ThreadPool", "threads", "0 (all available cores) or more",
                   std::to_string(threads), ""};
  });
  require<ConfigError>(!topology.nodes.empty(), [] {
    return Problem{"ThreadPool", "topology", "at least one node", "none", ""};
  });
  impl_ = std::make_unique<Impl>(threads == 0 ? default_threads() : threads, topology, patience);
  impl_->place_threads();
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

const Topology& ThreadPool::topology() const noexcept { return impl_->topology; }

int ThreadPool::nodes() const noexcept { return static_cast<int>(impl_->nodes.size()); }

void ThreadPool::run(std::int64_t chunks, std::int64_t per_node, Invoke invoke, void* body) {
  Impl& pool = *impl_;
  const bool dealt = per_node > 0;
  if (dealt) chunks = per_node * nodes();
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
    const std::int64_t longest = dealt ? per_node : chunks;
    for (std::int64_t first = 0; first < longest && !pool.cancelled.load(); first += kMaxRound) {
      const std::int64_t size = std::min(kMaxRound, longest - first);
      pool.run_round(
          [&](std::size_t n) {
            const std::int64_t begin = dealt ? static_cast<std::int64_t>(n) * per_node : 0;
            if (dealt) return Impl::Round{begin + first, begin + first + size};
            return Impl::Round{first + pool.topology.first_of(n, size),
                               first + pool.topology.first_of(n + 1, size)};
          },
          invoke, body, interrupt);
    }
  }
  const bool cancelled = pool.cancelled.load();
  pool.busy.store(false, std::memory_order_release);
  if (cancelled) Interrupt::cancel();
}

bool ThreadPool::borrow_openmp(const char* library) { return lend_openmp(library); }

std::shared_ptr<ThreadPool> ThreadPool::shared(int threads, std::int32_t nodes) {
  // Counting reads files of the cgroup: once, not for every context.
  static const int available = default_threads();
  const int count = threads == 0 ? available : threads;
  auto& registry = Impl::Registry::get();
  std::shared_ptr<ThreadPool> pool;
  std::shared_ptr<ThreadPool> spare;
  std::shared_ptr<ThreadPool> released;  // pools die after the lock, which their destructor takes
  const auto find = [&] {
    std::weak_ptr<ThreadPool>& slot = registry.shared[{count, nodes}];
    pool = slot.lock();
    if (pool == nullptr && spare != nullptr) slot = pool = spare;
    if (pool != nullptr) released = std::exchange(registry.latest, pool);
  };
  {
    const std::lock_guard lock(registry.mutex);
    find();
  }
  if (pool == nullptr) {
    spare = std::make_shared<ThreadPool>(count, machine_topology(nodes));
    const std::lock_guard lock(registry.mutex);
    find();
  }
  return pool;
}

}  // namespace moesaic
