// What the CUDA kernels offer to whoever launches them. Nothing of torch, nothing of CUDA.
//
// Each primitive has a pair of functions: the bytes of memory it needs (multiples of 256; addresses must be aligned to
// 256 bytes, the contents may be anything), and the launch itself, which returns a cudaError_t and waits for nothing.
// Of what a call needs, `prepared` is filled by prepare() before it, for all calls of a program at once; `workspace` is
// scratch, which calls that follow one another may share.
#pragma once

#include <cstddef>
#include <stdexcept>

#include "../problem.h"

namespace fused_densenet {

struct Device {
  int multiprocessors;
  int shared_per_block;  // bytes a block may have by opting in
  int capability;        // 10 * major + minor
};

// What is multiplied: bf16, f16 and tf32 by tensor cores, f32 by fused multiply-adds. Data is stored as bf16, f16,
// float, float; sums are float.
enum class Arithmetic { bf16, f16, tf32, f32 };

// A weight as kernels read it: `numbers` of what is multiplied, none where it is read as it is. As rows of `row` input
// channels or, with `groups` to a block, in the order of fragments.
struct Packing {
  Weight weight;
  int out, in, kernel[3], row, groups;
  int64_t numbers;
};

// What is done before a call in its prepared memory: a weight packed at its beginning, what counts blocks at zero, so
// many bytes behind it.
struct Preparation {
  Packing packing;
  void* at;
  int64_t counters_at, counters;
};

struct Needs {
  size_t prepared, workspace;
  Preparation preparation;  // but for its address
};

int prepare(const Preparation* calls, int64_t count, Arithmetic, void* stream);

Needs place_needs(const Place&, Arithmetic, const Device&);
int place(const Place&, Arithmetic, const Device&, void* prepared, void* workspace, void* stream);

size_t place_backward_workspace(const PlaceBackward&, Arithmetic, const Device&);
int place_backward(const PlaceBackward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t norm_relu_pool_workspace(const NormReluPool&, Arithmetic, const Device&);
int norm_relu_pool(const NormReluPool&, Arithmetic, const Device&, void* workspace, void* stream);

size_t norm_relu_pool_backward_workspace(const NormReluPoolBackward&, Arithmetic, const Device&);
int norm_relu_pool_backward(const NormReluPoolBackward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t update_running_workspace(const RunningUpdates&, Arithmetic, const Device&);
int update_running(const RunningUpdates&, Arithmetic, const Device&, void* workspace, void* stream);  // of float32

Needs conv1x1_forward_needs(const Forward&, Arithmetic, const Device&);
int conv1x1_forward(const Forward&, Arithmetic, const Device&, void* prepared, void* workspace, void* stream);

Needs conv3_forward_needs(const Forward&, Arithmetic, const Device&);
int conv3_forward(const Forward&, Arithmetic, const Device&, void* prepared, void* workspace, void* stream);

size_t conv1x1_backward_workspace(const Backward&, Arithmetic, const Device&);
int conv1x1_backward(const Backward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t conv3_backward_workspace(const Backward&, Arithmetic, const Device&);
int conv3_backward(const Backward&, Arithmetic, const Device&, void* workspace, void* stream);

inline Needs forward_needs(const Forward& f, Arithmetic arithmetic, const Device& device) {
  return (f.shape.taps() == 1 ? conv1x1_forward_needs : conv3_forward_needs)(f, arithmetic, device);
}

inline int forward(const Forward& f, Arithmetic arithmetic, const Device& device, void* prepared, void* workspace,
                   void* stream) {
  return (f.shape.taps() == 1 ? conv1x1_forward : conv3_forward)(f, arithmetic, device, prepared, workspace, stream);
}

inline size_t backward_workspace(const Backward& f, Arithmetic arithmetic, const Device& device) {
  return (f.shape.taps() == 1 ? conv1x1_backward_workspace : conv3_backward_workspace)(f, arithmetic, device);
}

inline int backward(const Backward& f, Arithmetic arithmetic, const Device& device, void* workspace, void* stream) {
  return (f.shape.taps() == 1 ? conv1x1_backward : conv3_backward)(f, arithmetic, device, workspace, stream);
}

// The same of any problem; most have nothing to prepare.
template <class Problem>
struct Launcher {
  size_t (*bytes)(const Problem&, Arithmetic, const Device&);
  int (*launch)(const Problem&, Arithmetic, const Device&, void* workspace, void* stream);

  Needs needs(const Problem& f, Arithmetic a, const Device& d) const { return {0, bytes(f, a, d), {}}; }
  int run(const Problem& f, Arithmetic a, const Device& d, void*, void* workspace, void* stream) const {
    return launch(f, a, d, workspace, stream);
  }
};

template <class Problem>
struct PreparedLauncher {
  Needs (*needs)(const Problem&, Arithmetic, const Device&);
  int (*run)(const Problem&, Arithmetic, const Device&, void* prepared, void* workspace, void* stream);
};

inline PreparedLauncher<Place> launcher(const Place&) { return {place_needs, place}; }
inline PreparedLauncher<Forward> launcher(const Forward&) { return {forward_needs, forward}; }
inline Launcher<PlaceBackward> launcher(const PlaceBackward&) { return {place_backward_workspace, place_backward}; }
inline Launcher<Backward> launcher(const Backward&) { return {backward_workspace, backward}; }
inline Launcher<NormReluPool> launcher(const NormReluPool&) { return {norm_relu_pool_workspace, norm_relu_pool}; }
inline Launcher<NormReluMean> launcher(const NormReluMean&) {
  throw std::runtime_error("norm_relu_mean: there is no kernel for CUDA");
}
inline Launcher<StridedConv> launcher(const StridedConv&) {
  throw std::runtime_error("strided_conv: there is no kernel for CUDA");
}
inline Launcher<NormReluPoolBackward> launcher(const NormReluPoolBackward&) {
  return {norm_relu_pool_backward_workspace, norm_relu_pool_backward};
}
inline Launcher<RunningUpdates> launcher(const RunningUpdates&) { return {update_running_workspace, update_running}; }

}  // namespace fused_densenet
