// Launches: threads as fibers, blocks one after the other, barriers.

#include "scheduler.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <utility>

extern "C" char __start_cuda_shared[] __attribute__((weak));
extern "C" char __stop_cuda_shared[] __attribute__((weak));

#ifdef __x86_64__
asm(R"(
.globl cuda_host_switch
.type cuda_host_switch,@function
cuda_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#endif

namespace cuda_host {

State state;
Thread* current = nullptr;
uint3 block_index;
dim3 grid_size, block_size;

uint3 thread_index() { return current->index; }
int lane() { return current->lane(); }
unsigned char* dynamic_shared() { return state.shared; }

namespace {

constexpr size_t kAlignment = 128;  // of dynamic shared memory

// Stores that no sanitizer sees: where it is only the runner that writes, and red zones too.
void fill_with_nan(void* memory, size_t bytes) {
  volatile char* p = static_cast<volatile char*>(memory);
  for (; bytes % 8; --bytes) p[bytes - 1] = char(0xFF);
  for (size_t i = 0; i < bytes; i += 8) *reinterpret_cast<volatile uint64_t*>(p + i) = ~uint64_t{0};
}

void switch_to(Thread* to, bool ends) {
  Thread* from = current ? current : &state.outside;
  if (from == to) return;
  current = to == &state.outside ? nullptr : to;
  from->fiber.switch_to(to->fiber, ends);
}

size_t static_shared_bytes() { return __start_cuda_shared ? size_t(__stop_cuda_shared - __start_cuda_shared) : 0; }

void thread_begins() {
#ifdef RUNNER_ASAN
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (!state.outside.fiber.stack) {
    state.outside.fiber.stack = static_cast<char*>(const_cast<void*>(stack));
    state.outside.fiber.stack_size = size;
  }
#endif
  acquire(&state.order.begin);
  acquire(&state.order.block[!state.parity]);
  state.task->run(state.task->kernel, state.task->values);
  release(&state.order.block[state.parity]);
  release(&state.order.end);
  current->done = true;
  --state.living;
  suspend(true);
  abort();
}

// Dynamic shared memory of exactly the size asked for, between poisoned bytes.
struct Arena {
  explicit Arena(size_t bytes) : memory(new unsigned char[bytes + kAlignment]) {
    const size_t before = -reinterpret_cast<uintptr_t>(memory.get()) % kAlignment;
#ifdef RUNNER_ASAN
    ASAN_POISON_MEMORY_REGION(memory.get(), before);
    ASAN_POISON_MEMORY_REGION(memory.get() + before + bytes, kAlignment - before);
    size = bytes + kAlignment;
#endif
    shared = memory.get() + before;
  }
#ifdef RUNNER_ASAN
  ~Arena() { ASAN_UNPOISON_MEMORY_REGION(memory.get(), size); }
  size_t size;
#endif
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared;
};

void prepare_threads() {
  while (int(state.pool.size()) < state.threads) {
    auto thread = std::make_unique<Thread>();
    thread->fiber.allocate();
    thread->id = int(state.pool.size());
#ifdef RUNNER_TSAN
    char name[32];
    snprintf(name, sizeof name, "CUDA thread %d", thread->id);
    thread->fiber.tsan = __tsan_create_fiber(0);
    __tsan_set_fiber_name(thread->fiber.tsan, name);
#endif
    state.pool.push_back(std::move(thread));
  }
}

uint64_t random_number() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  return state.random ^= state.random << 17;
}

void run_block(Arena& arena) {
  state.shared = arena.shared;
  fill_with_nan(state.shared, state.shared_bytes);
  fill_with_nan(__start_cuda_shared, static_shared_bytes());
  for (uint64_t& priority : state.priority) priority = random_number();
  state.warps.clear();
  state.warps.resize((state.threads + 31) / 32);
  state.waiting = 0;
  state.living = state.threads;
  state.barrier_arrived = 0;
  for (int i = 0; i < state.threads; ++i) {
    Thread* t = state.pool[i].get();
    const unsigned x = block_size.x, y = block_size.y;
    t->index = make_uint3(i % x, i / x % y, i / (x * y));
    t->done = false;
    t->at = "running";
    t->copies.clear();
    t->groups.clear();
    t->fiber.start_at(thread_begins);
    make_ready(t);
  }
  ++state.stats.blocks;
  suspend();  // until no thread can run
  if (!state.error.empty() || !state.living) return;
  const Thread* first = nullptr;
  int waiting = 0;
  for (int i = 0; i < state.threads; ++i) {
    const Thread* t = state.pool[i].get();
    if (t->done) continue;
    if (!waiting++) first = t;
  }
  char text[200];
  snprintf(text, sizeof text,
           "deadlock: %d of %d threads wait, the others ended; thread %d waits at %s, line %d [block %u,%u,%u]",
           waiting, state.threads, first->id, first->at, first->line, block_index.x, block_index.y, block_index.z);
  state.error = text;
}

}  // namespace

Thread*& ready(int i) { return state.ready[(state.first + i) % state.ready.size()]; }

void make_ready(Thread* thread) { ready(state.waiting++) = thread; }

void suspend(bool ends) {
  if (!state.waiting) return switch_to(&state.outside, ends);
  if (state.seed) {
    for (int i = 1; i < state.waiting; ++i) {
      if (state.priority[ready(i)->warp()] < state.priority[ready(0)->warp()]) std::swap(ready(i), ready(0));
    }
  }
  Thread* thread = ready(0);
  state.first = (state.first + 1) % int(state.ready.size());
  --state.waiting;
  switch_to(thread, ends);
}

void fail(const char* format, ...) {
  char text[512], where[96];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const uint3 b = block_index, t = current->index;
  snprintf(where, sizeof where, " [block %u,%u,%u thread %u,%u,%u]", b.x, b.y, b.z, t.x, t.y, t.z);
  state.error = std::string(text) + where;
  state.waiting = 0;
  switch_to(&state.outside, true);
  abort();
}

bool in_shared(const void* p, size_t bytes) {
  const auto inside = [&](const void* begin, size_t size) {
    const auto a = reinterpret_cast<uintptr_t>(p), b = reinterpret_cast<uintptr_t>(begin);
    return a >= b && a + bytes <= b + size;
  };
  return inside(state.shared, state.shared_bytes) || inside(__start_cuda_shared, static_shared_bytes());
}

void check_shared(const char* what, const void* p, size_t bytes) {
  if (!in_shared(p, bytes)) fail("%s %p is not in shared memory", what, p);
}

void barrier(int line) {
  if (state.barrier_arrived && state.barrier_line != line) {
    fail("__syncthreads in line %d, other threads of the block wait in line %d", line, state.barrier_line);
  }
  state.barrier_line = line;
  void* order = &state.order.barrier[state.barrier_count & 1];
  release(order);
  if (++state.barrier_arrived == state.threads) {
    state.barrier_arrived = 0;
    ++state.barrier_count;
    ++state.stats.barriers;
    for (int i = 0; i < state.threads; ++i) {
      if (state.pool[i].get() != current) make_ready(state.pool[i].get());
    }
  } else {
    current->at = "__syncthreads";
    current->line = line;
    suspend();
    current->at = "running";
  }
  acquire(order);
}

void fence() {
  release(&state.order.fence);
  acquire(&state.order.fence);
}

int launch(const Task& task) {
  const dim3 grid = task.grid, block = task.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (state.meanwhile) std::exchange(state.meanwhile, nullptr)();
  state.error.clear();
  if (threads < 1 || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFF ||
      grid.y > 65535 || grid.z > 65535 || task.shared > most_shared(task.kernel)) {
    state.error = "a launch beyond CUDA's limits";
    return cudaErrorInvalidConfiguration;
  }
  ++state.stats.launches;
  if (state.launcher) return state.launcher(&task);
  state.task = &task;
  state.threads = int(threads);
  state.shared_bytes = task.shared;
  state.random = (state.seed + 1) * 0x9E3779B97F4A7C15ull;
  state.outside.fiber.stack = nullptr;
  grid_size = grid;
  block_size = block;
#ifdef RUNNER_TSAN
  state.outside.fiber.tsan = __tsan_get_current_fiber();
#endif
  Arena arena(task.shared);
  prepare_threads();
  release(&state.order.begin);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks && state.error.empty(); ++b) {
    block_index = make_uint3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    state.parity = int(b & 1);
    run_block(arena);
  }
  acquire(&state.order.end);
  state.shared = nullptr;
  state.shared_bytes = 0;
  return state.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_host
