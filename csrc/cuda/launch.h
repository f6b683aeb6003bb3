// What the CUDA kernels offer to whoever launches them. Nothing of torch, nothing of CUDA.
//
// Each primitive has a pair of functions: the bytes of workspace it needs (a multiple of 256; the address must be
// aligned to 256 bytes, the contents may be anything), and the launch itself, which returns a cudaError_t and waits for
// nothing.
#pragma once

#include <cstddef>

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

size_t place_workspace(const Place&, Arithmetic, const Device&);
int place(const Place&, Arithmetic, const Device&, void* workspace, void* stream);

size_t place_backward_workspace(const PlaceBackward&, Arithmetic, const Device&);
int place_backward(const PlaceBackward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t norm_relu_pool_workspace(const NormReluPool&, Arithmetic, const Device&);
int norm_relu_pool(const NormReluPool&, Arithmetic, const Device&, void* workspace, void* stream);

size_t norm_relu_pool_backward_workspace(const NormReluPoolBackward&, Arithmetic, const Device&);
int norm_relu_pool_backward(const NormReluPoolBackward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t update_running_workspace(const RunningUpdates&, Arithmetic, const Device&);
int update_running(const RunningUpdates&, Arithmetic, const Device&, void* workspace, void* stream);  // of float32

size_t conv1x1_forward_workspace(const Forward&, Arithmetic, const Device&);
int conv1x1_forward(const Forward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t conv3_forward_workspace(const Forward&, Arithmetic, const Device&);
int conv3_forward(const Forward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t conv1x1_backward_workspace(const Backward&, Arithmetic, const Device&);
int conv1x1_backward(const Backward&, Arithmetic, const Device&, void* workspace, void* stream);

size_t conv3_backward_workspace(const Backward&, Arithmetic, const Device&);
int conv3_backward(const Backward&, Arithmetic, const Device&, void* workspace, void* stream);

inline size_t forward_workspace(const Forward& f, Arithmetic arithmetic, const Device& device) {
  return (f.shape.taps() == 1 ? conv1x1_forward_workspace : conv3_forward_workspace)(f, arithmetic, device);
}

inline int forward(const Forward& f, Arithmetic arithmetic, const Device& device, void* workspace, void* stream) {
  return (f.shape.taps() == 1 ? conv1x1_forward : conv3_forward)(f, arithmetic, device, workspace, stream);
}

inline size_t backward_workspace(const Backward& f, Arithmetic arithmetic, const Device& device) {
  return (f.shape.taps() == 1 ? conv1x1_backward_workspace : conv3_backward_workspace)(f, arithmetic, device);
}

inline int backward(const Backward& f, Arithmetic arithmetic, const Device& device, void* workspace, void* stream) {
  return (f.shape.taps() == 1 ? conv1x1_backward : conv3_backward)(f, arithmetic, device, workspace, stream);
}

}  // namespace fused_densenet
