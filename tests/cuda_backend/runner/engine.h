// What the runner does for the kernels that it executes.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace cuda_host {

struct Stats {
  uint64_t launches, blocks, barriers, shuffles, mma, ldmatrix, ldmatrix_conflicts, cp_async, attributes;
};

// One launch: the kernel with its arguments bound, and the arguments' bytes.
struct Task {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  int arguments;
  const void* const* values;
  const size_t* sizes;
  void (*run)(const void* kernel, const void* const* values);
};

int launch(const Task& task);

extern uint3 block_index;
extern dim3 grid_size, block_size;
uint3 thread_index();
int lane();
unsigned char* dynamic_shared();
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
void check_shared(const char* what, const void* p, size_t bytes);

void barrier(int line);
void warp_barrier(unsigned mask, int line);
void fence();
uint64_t shuffle(unsigned mask, uint64_t value, int from, int line);
unsigned ballot(unsigned mask, bool value, int line);

void load_matrices(const void* p, const uint32_t (&row)[4], uint32_t* r, int count, bool transposed);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

using CopyFunction = void(void* to, const void* from, int bytes, int valid);
void copy_begins(void* to, const void* from, int bytes, int valid);
void cp_async_commit();
void copies_arrive(int keep, CopyFunction* copy);

}  // namespace cuda_host
