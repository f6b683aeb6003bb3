// The running statistics of the norms of a call, 48 in a launch: a column of blocks for each.
#include <algorithm>

#include "launch.h"
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 256, kNorms = 48;  // as many as the parameters of a launch have room for, 4 KiB

struct Updates {
  RunningUpdate of[kNorms];
};
static_assert(sizeof(Updates) <= 4000);

__device__ void update(void* running, int64_t stride, const void* batch, int64_t c, float factor, float momentum) {
  float* const entry = static_cast<float*>(running) + c * stride;
  const float batch_entry = static_cast<const float*>(batch)[c] * factor, change = batch_entry - *entry;
  *entry = momentum < 0.5f ? fmaf(momentum, change, *entry) : fmaf(momentum - 1.0f, change, batch_entry);
}

__global__ void __launch_bounds__(kThreads) update_running_kernel(const __grid_constant__ Updates updates) {
  const RunningUpdate& u = updates.of[blockIdx.y];
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c == 0) ++*u.count;
  if (c >= u.channels) return;
  update(u.mean, u.mean_stride, u.batch_mean, c, 1.0f, static_cast<float>(u.momentum));
  update(u.var, u.var_stride, u.batch_var, c, static_cast<float>(u.unbiased), static_cast<float>(u.momentum));
}

}  // namespace

size_t update_running_workspace(const RunningUpdates&, Arithmetic, const Device&) { return 0; }

int update_running(const RunningUpdates& updates, Arithmetic, const Device&, void*, void* stream) {
  for (int64_t first = 0; first < updates.count; first += kNorms) {
    const int64_t norms = std::min<int64_t>(kNorms, updates.count - first);
    Updates batch{};
    std::copy_n(updates.data + first, norms, batch.of);
    int64_t channels = 1;
    for (int64_t i = 0; i < norms; ++i) channels = std::max(channels, batch.of[i].channels);
    const dim3 grid(static_cast<unsigned>((channels + kThreads - 1) / kThreads), static_cast<unsigned>(norms));
    const int error = LAUNCH(update_running_kernel, grid, dim3(kThreads), 0, stream, batch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fused_densenet
