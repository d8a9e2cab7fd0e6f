// Blocks, fibers and barriers for device_on_host.h. Compiled without instrumentation. The weak
// symbols below inform the sanitizers about the fibers and their order.
#include "device_on_host.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack,
                                                  size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack,
                                                   size_t* size);
}

namespace anchorops::on_host {
namespace {

constexpr size_t STACK = 256 << 10;
constexpr unsigned TSAN_NO_ORDER = 1;  // switching to a fiber orders nothing

void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}
void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}

enum class Waits { NOT, FOR_BLOCK, FOR_WARP, FOREVER };

// Where a fiber continues. Contexts also have a mask of signals, so each switch would be a system
// call, and these would take most of the time. So contexts only begin the fibers.
using Position = void* [5];

[[noreturn, gnu::noinline]] void jump(Position& position) { __builtin_longjmp(position, 1); }

struct Fiber {
  ucontext_t context;
  bool has_begun = false;
  Position position;
  std::unique_ptr<char[]> stack{new char[STACK]};
  void* tsan = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
  void* fake_stack = nullptr;
  Waits waits = Waits::FOREVER;
  // Its value for the lanes of `mask`, and their values.
  unsigned mask = 0;
  Slot brought, received[32];
  std::map<unsigned, unsigned> warp_barriers;  // passed, for each mask
  std::vector<std::pair<Copy, int>> copies;    // each with its group
  int groups = 0;
};

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  const std::function<void()>* kernel;
  char begin, end;  // tokens that order a launch after earlier code, and before later code
};

// 0: the threads of one block run from the first to the last, those of the other block from the
// last to the first. Otherwise a seed; the order changes each time that all threads were visited.
std::atomic<unsigned> order_set = 0;

// One of the running blocks, and the system thread that runs it.

class Worker {
 public:
  // The system thread exists as long as the process: starting one for each launch would take most
  // of ThreadSanitizer's time.
  explicit Worker(unsigned parity) : parity_(parity) {
    std::thread([this] {
      current = this;
      if (__tsan_get_current_fiber) scheduler_tsan_ = __tsan_get_current_fiber();
      for (;;) {
        given_.wait(nullptr);
        run(*given_);
        given_ = nullptr;
        given_.notify_all();
      }
    }).detach();
  }

  void begin(Launch& launch) {
    given_ = &launch;
    given_.notify_all();
  }
  void finish(Launch& launch) { given_.wait(&launch); }

  void run(Launch& launch) {
    acquire(&launch.begin);
    launch_ = &launch;
    const dim3 grid = launch.grid, block = launch.block;
    threads_ = block.x * block.y * block.z;
    if (threads_ % 32) fail("blocks must consist of whole warps");
    while (fibers_.size() < threads_) fibers_.push_back(std::make_unique<Fiber>());
    order_.resize(threads_);
    std::iota(order_.begin(), order_.end(), 0);
    if (parity_) std::reverse(order_.begin(), order_.end());
    random_order_ = order_set > 0;
    random_.seed(2 * order_set + parity_);
    place = {{}, {}, block, grid};
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t i = parity_; i < blocks; i += 2) {
      place.block = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
      run_block();
    }
    release(&launch.end);
  }

  void wait(Waits what, unsigned mask = 0) {
    Fiber& fiber = *fibers_[thread_];
    fiber.waits = what;
    fiber.mask = mask;
    const bool ends = what == Waits::FOREVER;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_tsan_, TSAN_NO_ORDER);
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(ends ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                     scheduler_stack_size_);
    if (!__builtin_setjmp(fiber.position)) jump(scheduler_);
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(ends ? nullptr : fiber.fake_stack, &scheduler_stack_,
                                      &scheduler_stack_size_);
  }

  Fiber& fiber() { return *fibers_[thread_]; }
  // Orders the lanes of a mask in their next barrier. A lane that is one barrier ahead uses the
  // other of two tokens.
  char& next_warp_token(unsigned mask) {
    return warp_tokens_[thread_ / 32][mask][fiber().warp_barriers[mask]++ % 2];
  }
  unsigned lane() const { return thread_ % 32; }
  unsigned char* shared() const { return shared_; }

  [[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "%s: block (%u, %u, %u), thread %u: %s\n", launch_->name, place.block.x,
                 place.block.y, place.block.z, thread_, what);
    std::abort();
  }

  static thread_local Worker* current;
  Place place;
  char barriers[2];
  unsigned barriers_passed = 0;

 private:
  static void enter() {
    Worker& worker = *current;
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(nullptr, &worker.scheduler_stack_,
                                      &worker.scheduler_stack_size_);
    for (;;) {  // over blocks
      acquire(&worker.begin_of_block_);
      (*worker.launch_->kernel)();
      release(&worker.end_of_block_);
      worker.wait(Waits::FOREVER);
    }
  }

  void run_block() {
    // Exactly the requested size, filled with NaN.
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, std::max<size_t>(launch_->shared_bytes, 1))) std::abort();
    std::memset(memory, 0xff, launch_->shared_bytes);
    release(&begin_of_block_);
    shared_ = static_cast<unsigned char*>(memory);
    for (unsigned i = 0; i < threads_; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.waits = Waits::NOT;
      for (auto& [mask, passed] : fiber.warp_barriers) passed = 0;
      fiber.copies.clear();
      fiber.groups = 0;
    }
    barriers_passed = 0;
    for (;;) {
      bool progress = false, all_done = true;
      if (random_order_) std::shuffle(order_.begin(), order_.end(), random_);
      for (const unsigned thread : order_) {
        thread_ = thread;
        if (fibers_[thread_]->waits == Waits::NOT) {
          resume();
          progress = true;
        }
        all_done &= fibers_[thread_]->waits == Waits::FOREVER;
      }
      if (all_done) break;
      progress |= pass_barrier();
      for (unsigned first = 0; first < threads_; first += 32) progress |= pass_warp(first);
      if (!progress) fail("waits for threads that wait for others or have ended");
    }
    acquire(&end_of_block_);
    std::free(memory);
  }

  void resume() {
    Fiber& fiber = *fibers_[thread_];
    const dim3 block = launch_->block;
    place.thread =
        dim3(thread_ % block.x, thread_ / block.x % block.y, thread_ / block.x / block.y);
    void* fake_stack = nullptr;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, TSAN_NO_ORDER);
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), STACK);
    if (!__builtin_setjmp(scheduler_)) {
      if (fiber.has_begun) jump(fiber.position);
      fiber.has_begun = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, &Worker::enter, 0);
      setcontext(&fiber.context);
    }
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  // The barrier of a block is complete when every thread that has not ended has reached it.
  bool pass_barrier() {
    for (unsigned i = 0; i < threads_; ++i)
      if (fibers_[i]->waits != Waits::FOR_BLOCK && fibers_[i]->waits != Waits::FOREVER)
        return false;
    ++barriers_passed;
    for (unsigned i = 0; i < threads_; ++i)
      if (fibers_[i]->waits == Waits::FOR_BLOCK) fibers_[i]->waits = Waits::NOT;
    return true;
  }

  // An exchange is complete when all lanes of its mask have reached it.
  bool pass_warp(unsigned first) {
    const unsigned lanes = std::min(32u, threads_ - first);
    bool passed = false;
    for (unsigned i = 0; i < lanes; ++i) {
      if (fibers_[first + i]->waits != Waits::FOR_WARP) continue;
      const unsigned mask = fibers_[first + i]->mask;
      std::vector<std::pair<unsigned, Fiber*>> named;
      for (unsigned j = 0; j < lanes; ++j)
        if (mask >> j & 1) named.emplace_back(j, fibers_[first + j].get());
      bool complete = true;
      for (const auto& [j, fiber] : named)
        complete &= fiber->waits == Waits::FOR_WARP && fiber->mask == mask;
      if (!complete) continue;
      for (const auto& [to, receiver] : named) {
        receiver->waits = Waits::NOT;
        for (const auto& [from, sender] : named) receiver->received[from] = sender->brought;
      }
      passed = true;
    }
    return passed;
  }

  const unsigned parity_;
  std::atomic<Launch*> given_ = nullptr;
  Launch* launch_ = nullptr;
  unsigned threads_ = 0, thread_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::map<unsigned, char[2]> warp_tokens_[32];  // for each warp and mask
  std::vector<unsigned> order_;
  bool random_order_ = false;
  std::minstd_rand random_;
  unsigned char* shared_ = nullptr;
  Position scheduler_;
  void* scheduler_tsan_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  char begin_of_block_, end_of_block_;  // tokens: no thread's end is before another one's begin
};

thread_local Worker* Worker::current = nullptr;

}  // namespace

void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  std::lock_guard lock(one_at_a_time);
  static Worker& even = *new Worker(0);
  static Worker& odd = *new Worker(1);
  Launch job{name, grid, block, shared_bytes, &kernel, 0, 0};
  release(&job.begin);
  even.begin(job);
  odd.begin(job);
  even.finish(job);
  odd.finish(job);
  acquire(&job.end);
}

static std::mutex launched_mutex;
static std::set<uintptr_t> launched;

void note_launch(const void* kernel) {
  Dl_info library;
  if (!dladdr(kernel, &library)) return;
  const std::lock_guard lock(launched_mutex);
  launched.insert(reinterpret_cast<uintptr_t>(kernel) -
                  reinterpret_cast<uintptr_t>(library.dli_fbase));
}

std::set<uintptr_t> launched_kernels() {
  const std::lock_guard lock(launched_mutex);
  return std::exchange(launched, {});
}

void fill_zero(void* memory, size_t bytes) { std::memset(memory, 0, bytes); }

static std::atomic<int> multiprocessors_set = 2, shared_kilobytes_set = 228;

int multiprocessors() { return multiprocessors_set; }

size_t shared_kilobytes() { return shared_kilobytes_set; }

void set_hardware(int multiprocessors, int shared_kilobytes) {
  multiprocessors_set = multiprocessors;
  shared_kilobytes_set = shared_kilobytes;
}

void set_order(unsigned seed) { order_set = seed; }

Place place() { return Worker::current->place; }

unsigned char* shared_memory() { return Worker::current->shared(); }

unsigned lane() { return Worker::current->lane(); }

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    Worker::current->fail("a vector access to a misaligned address");
}

void block_barrier() {
  Worker& worker = *Worker::current;
  char& token = worker.barriers[worker.barriers_passed % 2];
  release(&token);
  worker.wait(Waits::FOR_BLOCK);
  acquire(&token);
}

const Slot* exchange(unsigned mask, const Slot& brought) {
  Worker& worker = *Worker::current;
  if (!(mask >> worker.lane() & 1)) worker.fail("takes part in a warp's exchange without its mask");
  Fiber& fiber = worker.fiber();
  fiber.brought = brought;
  worker.wait(Waits::FOR_WARP, mask);
  return fiber.received;
}

void warp_barrier(unsigned mask) {
  char& token = Worker::current->next_warp_token(mask);
  release(&token);
  exchange(mask, {});
  acquire(&token);
}

static double element(unsigned pair, int which, bool is_float16) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * which);
  if (is_float16) return torch::headeronly::Half(bits, torch::headeronly::Half::from_bits());
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool is_float16) {
  struct Operands {
    unsigned a[4], b[2];
  } operands[32];
  std::memcpy(operands->a, a, sizeof a);
  std::memcpy(operands->b, b, sizeof b);
  const Slot* slots = exchange_values(0xffffffff, operands[0]);
  for (int i = 0; i < 32; ++i) std::memcpy(&operands[i], &slots[i], sizeof operands[i]);
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int register_of_a = row / 8 + k / 8 * 2, quarter = k % 8 / 2;
      sum += element(operands[row % 8 * 4 + quarter].a[register_of_a], k % 2, is_float16) *
             element(operands[column * 4 + quarter].b[k / 8], k % 2, is_float16);
    }
    c[i] = static_cast<float>(sum);
    if (std::abs(c[i]) > std::abs(sum)) c[i] = std::nextafter(c[i], 0.f);  // truncated
  }
}

void copy_async(void* to, const void* from, int bytes, int size) {
  Worker& worker = *Worker::current;
  check_alignment(to, size);
  check_alignment(from, size);
  if (bytes < 0 || bytes > size)
    worker.fail("an asynchronous copy of less than 0 or too many bytes");
  Fiber& fiber = worker.fiber();
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes,
                  size};
  fiber.copies.emplace_back(copy, fiber.groups);
}

void commit_copies() { ++Worker::current->fiber().groups; }

bool next_copy(int pending_groups, Copy* copy) {
  Fiber& fiber = Worker::current->fiber();
  if (fiber.copies.empty() || fiber.copies.front().second >= fiber.groups - pending_groups)
    return false;
  *copy = fiber.copies.front().first;
  fiber.copies.erase(fiber.copies.begin());
  return true;
}

}  // namespace anchorops::on_host
