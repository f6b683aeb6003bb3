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

// Memory for a call, aligned to 64.
struct Memory {
  void* data;
  size_t bytes;
};

// A primitive's kernel for one data type. A call takes a workspace of the size that it states, in bytes: it returns
// that, and runs where it was given as much. Results do not depend on which thread ran what.
template <class Problem>
struct Entry {
  size_t (*workspace)(const Problem&, int threads);
  size_t (*run)(const Problem&, const Memory& workspace, const Parallel&);
};

// How a kernel reads a convolution's weight: which of the layouts of a weight it takes, of how many bytes, and what
// makes it.
struct Packing {
  int (*layout)(const Forward&);
  size_t (*bytes)(const Forward&);
  void (*pack)(const Forward&, void* out, const Parallel&);
};

// One instruction set's kernels for one data type.
struct Kernels {
  Entry<Forward> forward;
  Entry<Backward> backward;
  Entry<Place> place;
  Entry<PlaceBackward> place_backward;
  Entry<NormReluPool> norm_relu_pool;
  Entry<NormReluPoolBackward> norm_relu_pool_backward;
  Entry<NormReluMean> norm_relu_mean;
  Entry<StridedConv> strided_conv;
  Packing packing;
};

inline const Entry<Forward>& entry(const Kernels& k, const Forward&) { return k.forward; }
inline const Entry<Backward>& entry(const Kernels& k, const Backward&) { return k.backward; }
inline const Entry<Place>& entry(const Kernels& k, const Place&) { return k.place; }
inline const Entry<PlaceBackward>& entry(const Kernels& k, const PlaceBackward&) { return k.place_backward; }
inline const Entry<NormReluPool>& entry(const Kernels& k, const NormReluPool&) { return k.norm_relu_pool; }
inline const Entry<NormReluPoolBackward>& entry(const Kernels& k, const NormReluPoolBackward&) {
  return k.norm_relu_pool_backward;
}
inline const Entry<NormReluMean>& entry(const Kernels& k, const NormReluMean&) { return k.norm_relu_mean; }
inline const Entry<StridedConv>& entry(const Kernels& k, const StridedConv&) { return k.strided_conv; }

// The kernels for a data type where torch uses an instruction set (as it names them: "AVX512", "AVX2", anything else is
// the least), and their name.
const Kernels& kernels_for(DType dtype, const char* capability);
const char* kernels_name(DType dtype, const char* capability);

}  // namespace fused_densenet
