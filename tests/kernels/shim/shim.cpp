// The scheduler of the shim.  Never compiled for ThreadSanitizer, which would see its bookkeeping as races of
// the fibers; what the fibers are to see of one another is told to it here.
#include "shim.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(SHIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
constexpr bool kTsan = true;
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
constexpr bool kTsan = false;
#endif
#if defined(SHIM_ASAN)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace shim {
namespace {

constexpr unsigned kLanes = 32, kNoOrder = 1;
constexpr size_t kStackBytes = size_t{64} << 10;

enum class State { ready, at_barrier, in_warp, exited };

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<void, Free> stack;
  void *fake_stack = nullptr, *tsan = nullptr;
  dim3 index;
  State state = State::ready;
  Place place;          // where it waits
  unsigned mask = 0;    // for which lanes
  bool orders = false;  // and whether what they did is then before what they do
  bool vote = false;    // what it gives
  uint64_t word = 0;    // likewise
  unsigned source = 0;  // whose word it wants
  uint64_t result = 0;  // what it gets
  unsigned votes = 0;   // likewise
};

// Of the block that runs.
dim3 grid_dim, block_dim, block_idx;
std::vector<Fiber> all_fibers;
std::span<Fiber> fibers;
Fiber* running = nullptr;
constinit std::vector<void*> slots;  // used before main
void* dynamic = nullptr;
const std::function<void()>* body = nullptr;
Order turns = Order::ascending;
bool last_block_only = false;
size_t largest_launch = 0;

// Of the thread that launches.
ucontext_t host;
void *host_tsan = nullptr, *host_fake_stack = nullptr;
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;

// To ThreadSanitizer a thread that comes after all blocks so far, while the next block does not come after
// it: it frees what they used.
void* janitor = nullptr;

// To ThreadSanitizer, f() is done by the thread `tsan`.
template <class F>
auto as(void* tsan, const F& f) {
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan, kNoOrder);
  if constexpr (std::is_void_v<decltype(f())>) {
    f();
    __tsan_switch_to_fiber(self, kNoOrder);
  } else {
    const auto result = f();
    __tsan_switch_to_fiber(self, kNoOrder);
    return result;
  }
}

// What these fibers did is before all that they do from now on.
void order(const std::vector<Fiber*>& group) {
  if (!kTsan) return;
  void* address = group.front()->stack.get();
  for (Fiber* fiber : group) as(fiber->tsan, [&] { __tsan_release(address); });
  for (Fiber* fiber : group) as(fiber->tsan, [&] { __tsan_acquire(address); });
}

void enter(Fiber& fiber) {
  running = &fiber;
  __sanitizer_start_switch_fiber(&host_fake_stack, fiber.stack.get(), kStackBytes);
  __tsan_switch_to_fiber(fiber.tsan, kNoOrder);
  swapcontext(&host, &fiber.context);
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
  running = nullptr;
}

// Back to the host; returns when the fiber is entered again, if ever.
void leave(State state) {
  Fiber& fiber = *running;
  fiber.state = state;
  __sanitizer_start_switch_fiber(state == State::exited ? nullptr : &fiber.fake_stack, host_stack,
                                 host_stack_bytes);
  __tsan_switch_to_fiber(host_tsan, kNoOrder);
  swapcontext(&fiber.context, &host);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &host_stack, &host_stack_bytes);
}

void begin_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
  (*body)();
  leave(State::exited);
}

// As large as is asked for, so that AddressSanitizer sees its end; written by the host before any thread of
// the block does anything.
void* filled(size_t bytes, size_t alignment) {
  return as(host_tsan, [&] {
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
    std::memset(memory, 0xFF, bytes);
    __tsan_release(memory);
    for (Fiber& fiber : fibers) {
      if (kTsan) as(fiber.tsan, [&] { __tsan_acquire(memory); });
    }
    return memory;
  });
}

std::string where(const Fiber& fiber) {
  const std::string file = fiber.place.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(fiber.place.line());
}

bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Serves the block if all its threads are at one barrier.
bool serve_block() {
  const bool complete = std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) {
    return fiber.state == State::at_barrier && same_place(fiber.place, fibers.front().place);
  });
  if (!complete) return false;
  const auto votes = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.vote; });
  std::vector<Fiber*> group;
  for (Fiber& fiber : fibers) {
    fiber.result = static_cast<uint64_t>(votes);
    fiber.state = State::ready;
    group.push_back(&fiber);
  }
  order(group);
  return true;
}

// Serves the lanes that wait for the same lanes at the same place, if all of them are there.
bool serve_warp(Fiber* lanes, unsigned count) {
  bool served = false;
  for (unsigned i = 0; i < count; ++i) {
    if (lanes[i].state != State::in_warp) continue;
    const unsigned mask = lanes[i].mask;
    const Place place = lanes[i].place;
    const bool orders = lanes[i].orders;
    const auto takes_part = [&](unsigned lane) {
      return lane < count && lanes[lane].state == State::in_warp && lanes[lane].mask == mask &&
             same_place(lanes[lane].place, place);
    };
    std::vector<Fiber*> group;
    unsigned votes = 0;
    bool complete = (mask >> i & 1) != 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      complete = complete && takes_part(lane);
      if (!complete) break;
      group.push_back(lanes + lane);
      if (lanes[lane].vote) votes |= 1u << lane;
    }
    if (!complete) continue;
    for (Fiber* fiber : group) {
      const bool given = fiber->source < kLanes && (mask >> fiber->source & 1) != 0;
      fiber->result = given ? lanes[fiber->source].word : ~uint64_t{0};
      fiber->votes = votes;
      fiber->state = State::ready;
    }
    if (orders) order(group);
    served = true;
  }
  return served;
}

// Lets every fiber go on that can; false if none could.
bool take_a_turn() {
  bool moved = false;
  const size_t warps = (fibers.size() + kLanes - 1) / kLanes;
  for (size_t w = 0; w < warps; ++w) {
    const size_t first = kLanes * (turns == Order::ascending ? w : warps - 1 - w);
    const size_t count = std::min<size_t>(kLanes, fibers.size() - first);
    do {  // a warp goes as far as it can by itself
      for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = fibers[first + (turns == Order::ascending ? i : count - 1 - i)];
        if (fiber.state != State::ready) continue;
        enter(fiber);
        moved = true;
      }
    } while (serve_warp(&fibers[first], static_cast<unsigned>(count)));
  }
  return serve_block() || moved;
}

bool all_exited() {
  return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::exited; });
}

std::string states() {
  std::string text = "the threads of a block wait for one another in vain:";
  for (size_t i = 0; i < fibers.size(); ++i) {
    const Fiber& fiber = fibers[i];
    const std::string now = fiber.state == State::exited ? "exited" : "waits at " + where(fiber);
    text += " " + std::to_string(i) + " " + now + ";";
    if (i >= 3 && i + 2 < fibers.size()) i = fibers.size() - 2;
  }
  return text;
}

// Frees what the block used.
void end_block() {
  for (Fiber& fiber : fibers) as(fiber.tsan, [] { __tsan_release(&janitor); });
  as(janitor, [] {
    __tsan_acquire(&janitor);
    for (void*& slot : slots) {
      std::free(slot);
      slot = nullptr;
    }
    std::free(dynamic);
    dynamic = nullptr;
  });
}

void run_block() {
  for (Fiber& fiber : fibers) {
    fiber.state = State::ready;
    fiber.orders = false;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin_fiber, 0);
  }
  while (!all_exited()) {
    if (take_a_turn()) continue;
    const std::string message = states();
    end_block();
    throw std::runtime_error(message);
  }
  end_block();
}

}  // namespace

dim3 thread_index() { return running->index; }
dim3 block_index() { return block_idx; }
dim3 block_size() { return block_dim; }
dim3 grid_size() { return grid_dim; }

int block_count(bool vote, const Place& place) {
  Fiber& fiber = *running;
  fiber.place = place;
  fiber.vote = vote;
  leave(State::at_barrier);
  return static_cast<int>(fiber.result);
}

unsigned ballot(unsigned mask, bool vote, const Place& place) {
  Fiber& fiber = *running;
  fiber.place = place;
  fiber.mask = mask;
  fiber.vote = vote;
  leave(State::in_warp);
  return fiber.votes;
}

uint64_t exchange(unsigned mask, uint64_t word, unsigned source_lane, const Place& place) {
  Fiber& fiber = *running;
  fiber.word = word;
  fiber.source = source_lane;
  ballot(mask, false, place);
  return fiber.result;
}

void warp_barrier(unsigned mask, const Place& place) {
  Fiber& fiber = *running;
  fiber.orders = true;
  ballot(mask, false, place);
  fiber.orders = false;
}

size_t new_slot() {
  slots.push_back(nullptr);
  return slots.size() - 1;
}

void* shared_memory(size_t slot, size_t bytes, size_t alignment) {
  if (slots[slot] == nullptr) slots[slot] = filled(bytes, alignment);
  return slots[slot];
}

void* dynamic_shared_memory() { return dynamic; }

void take_turns(Order order) {
  turns = order;
  largest_launch = 0;
}

void run_last_block_only(bool only) { last_block_only = only; }

size_t most_threads() { return largest_launch; }

void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("a grid has at least a block, and at most 65535 in y and z");
  }
  grid_dim = grid;
  block_dim = block;
  body = &thread;
  host_tsan = __tsan_get_current_fiber();
  if (janitor == nullptr) janitor = __tsan_create_fiber(0);
  const dim3 begin = last_block_only ? dim3{grid.x - 1, grid.y - 1, grid.z - 1} : dim3{0, 0, 0};
  const size_t all_blocks = size_t{grid.x - begin.x} * (grid.y - begin.y) * (grid.z - begin.z);
  largest_launch = std::max(largest_launch, threads * all_blocks);
  // ThreadSanitizer is to know the threads of all blocks apart.
  const size_t blocks = kTsan ? all_blocks : 1;
  if (kTsan && threads * blocks > 7000) throw std::runtime_error("ThreadSanitizer has room for 7000 threads");
  __tsan_release(&all_fibers);
  while (all_fibers.size() < threads * blocks) {
    Fiber& fiber = all_fibers.emplace_back();
    fiber.stack.reset(std::malloc(kStackBytes));
    fiber.tsan = __tsan_create_fiber(0);
  }
  fibers = std::span(all_fibers).first(threads * blocks);
  for (size_t i = 0; i < fibers.size(); ++i) {
    const unsigned t = static_cast<unsigned>(i % threads);
    fibers[i].index = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
    if (kTsan) as(fibers[i].tsan, [] { __tsan_acquire(&all_fibers); });
  }
  size_t first = 0;
  for (unsigned z = begin.z; z < grid.z; ++z) {
    for (unsigned y = begin.y; y < grid.y; ++y) {
      for (unsigned x = begin.x; x < grid.x; ++x) {
        block_idx = {x, y, z};
        fibers = std::span(all_fibers).subspan(first, threads);
        if (kTsan) first += threads;
        if (dynamic_shared_bytes != 0) dynamic = filled(dynamic_shared_bytes, 16);
        run_block();
      }
    }
  }
  __tsan_acquire(&janitor);
}

}  // namespace shim
