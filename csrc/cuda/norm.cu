// A norm's vectors, one launch for what would be many of an entry per channel each.
#include "launch.h"
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) norm_scale_kernel(NormScale f) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= f.shape.in) return;
  const float var = static_cast<const float*>(f.var)[c] + static_cast<float>(f.eps);
  static_cast<float*>(f.scale)[c] = static_cast<const float*>(f.gamma)[c] / sqrtf(var);
}

__global__ void __launch_bounds__(kThreads) norm_backward_kernel(NormBackward f) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= f.shape.in) return;
  const float* const sums = static_cast<const float*>(f.sums) + c;
  float* const correction = static_cast<float*>(f.correction) + c;
  const float rstd = 1.0f / sqrtf(static_cast<const float*>(f.var)[c] + static_cast<float>(f.eps));
  const float sum = sums[0], centered = sums[f.sums_ld];
  static_cast<float*>(f.dgamma)[c] = centered * rstd;
  float constant = f.accumulate ? correction[0] : 0.0f, slope = f.accumulate ? correction[f.correction_ld] : 0.0f;
  if (f.pixels != nullptr) {
    const float share = static_cast<const float*>(f.scale)[c] / *static_cast<const float*>(f.pixels);
    constant -= share * sum;
    slope -= share * centered * (rstd * rstd);
  }
  correction[0] = constant;
  correction[f.correction_ld] = slope;
}

dim3 blocks(const Shape& s) { return dim3(static_cast<unsigned>((s.in + kThreads - 1) / kThreads)); }

}  // namespace

size_t norm_scale_workspace(const NormScale&, Arithmetic, const Device&) { return 0; }

int norm_scale(const NormScale& f, Arithmetic, const Device&, void*, void* stream) {
  return LAUNCH(norm_scale_kernel, blocks(f.shape), dim3(kThreads), 0, stream, f);
}

size_t norm_backward_workspace(const NormBackward&, Arithmetic, const Device&) { return 0; }

int norm_backward(const NormBackward& f, Arithmetic, const Device&, void*, void* stream) {
  return LAUNCH(norm_backward_kernel, blocks(f.shape), dim3(kThreads), 0, stream, f);
}

}  // namespace fused_densenet
