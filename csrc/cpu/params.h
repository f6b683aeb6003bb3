// What the CPU's kernels are called with, beside the problem itself.
#pragma once

#include "../problem.h"

namespace fused_densenet {

// Runs body(context, i) for every i in [0, count), on up to `threads` threads.
struct Parallel {
  void (*run)(int64_t count, void (*body)(void* context, int64_t i), void* context);
  int threads;
};

template <class F>
void parallel_for(const Parallel& parallel, int64_t count, const F& body) {
  parallel.run(count, [](void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, const_cast<F*>(&body));
}

// One instruction set's kernels for one data type. Every call takes a workspace of the size that it states, in bytes,
// aligned to 64; results do not depend on which thread ran what.
struct Kernels {
  size_t (*forward_workspace)(const Forward&, int threads);
  void (*forward)(const Forward&, void* workspace, const Parallel&);
  size_t (*backward_workspace)(const Backward&, int threads);
  void (*backward)(const Backward&, void* workspace, const Parallel&);
  size_t (*place_workspace)(const Place&, int threads);
  void (*place)(const Place&, void* workspace, const Parallel&);
  size_t (*place_backward_workspace)(const PlaceBackward&, int threads);
  void (*place_backward)(const PlaceBackward&, void* workspace, const Parallel&);
  size_t (*norm_relu_pool_workspace)(const NormReluPool&, int threads);
  void (*norm_relu_pool)(const NormReluPool&, void* workspace, const Parallel&);
  size_t (*norm_relu_pool_backward_workspace)(const NormReluPoolBackward&, int threads);
  void (*norm_relu_pool_backward)(const NormReluPoolBackward&, void* workspace, const Parallel&);
};

// The kernels for a data type on an instruction set ("AVX512", "AVX2", anything else is portable), and their name.
const Kernels& kernels_for(DType dtype, const char* capability);
const char* kernels_name(DType dtype, const char* capability);

}  // namespace fused_densenet
