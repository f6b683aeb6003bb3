// Fibers: stacks of their own on one OS thread, known to the sanitizers.
#pragma once

#include <sys/mman.h>

#include <cstddef>

#ifdef RUNNER_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef RUNNER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_host {

#ifdef __x86_64__
extern "C" void cuda_host_switch(void** save, void* load);
#endif

struct Fiber {
#if defined(RUNNER_TSAN) || defined(RUNNER_ASAN)
  static constexpr size_t kStack = 512 << 10;
#else
  static constexpr size_t kStack = 128 << 10;
#endif
  static constexpr size_t kGuard = 4096;  // bytes below the stack that nobody may touch

#ifdef __x86_64__
  void* saved = nullptr;
#else
  ucontext_t saved;
#endif
  char* stack = nullptr;
  size_t stack_size = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;

  void allocate() {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, kGuard, PROT_NONE);
    stack = static_cast<char*>(memory) + kGuard;
    stack_size = kStack;
  }

  void start_at(void (*entry)()) {
#ifdef RUNNER_ASAN
    ASAN_UNPOISON_MEMORY_REGION(stack, stack_size);
#endif
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(stack + stack_size);
    *--top = nullptr;  // the stack pointer is 8 modulo 16 when a function begins
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    saved = top;
#else
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = stack_size;
    saved.uc_link = nullptr;
    makecontext(&saved, entry, 0);
#endif
  }

  // Continues `to`; returns when somebody continues this fiber. One that ends never returns.
  void switch_to(Fiber& to, [[maybe_unused]] bool ends) {
#ifdef RUNNER_TSAN
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef RUNNER_ASAN
    __sanitizer_start_switch_fiber(ends ? nullptr : &fake_stack, to.stack, to.stack_size);
#endif
#ifdef __x86_64__
    cuda_host_switch(&saved, to.saved);
#else
    swapcontext(&saved, &to.saved);
#endif
#ifdef RUNNER_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }
};

// The only order between fibers that the thread sanitizer knows: what a release came before, an acquire comes after.
inline void release([[maybe_unused]] void* object) {
#ifdef RUNNER_TSAN
  __tsan_release(object);
#endif
}

inline void acquire([[maybe_unused]] void* object) {
#ifdef RUNNER_TSAN
  __tsan_acquire(object);
#endif
}

}  // namespace cuda_host
