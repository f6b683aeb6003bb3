#include "moments.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 512, kChannels = 8, kGroups = kThreads / kChannels, kWarps = kThreads / 32;

// Adds `part` over the groups of one channel, in a fixed order.
__device__ float add_parts(float part, float (&scratch)[kWarps][kChannels]) {
  part += __shfl_xor_sync(~0u, part, 8);
  part += __shfl_xor_sync(~0u, part, 16);
  const int lane = threadIdx.x % 32;
  if (lane < kChannels) scratch[threadIdx.x / 32][lane] = part;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += scratch[i][lane % kChannels];
  __syncthreads();
  return sum;
}

// A block for 8 channels, one sector of memory; each group of 8 threads takes every kGroups-th row. The mean first,
// around the first row's, then the squares around the mean: two passes over a few rows instead of a chain of merges.
__global__ void __launch_bounds__(kThreads) merge(MomentRows rows, float* mean, float* var, float share) {
  __shared__ float scratch[kWarps][kChannels];
  const int group = threadIdx.x / kChannels;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x % kChannels;
  const int64_t c = own < rows.channels ? own : rows.channels - 1;
  const float pivot = rows.mean(0)[c];
  float distance = 0;
#pragma unroll 4
  for (int64_t row = group; row < rows.rows; row += kGroups) {
    const float d = rows.mean(row)[c] - pivot + rows.drift(row)[c];
    distance = fmaf(*rows.count(row) * share, d, distance);
  }
  const float merged = pivot + add_parts(distance, scratch);
  float squares = 0;
#pragma unroll 4
  for (int64_t row = group; row < rows.rows; row += kGroups) {
    const float d = rows.mean(row)[c] - merged + rows.drift(row)[c];
    squares += fmaf(*rows.count(row) * d, d, rows.m2(row)[c]);
  }
  squares = add_parts(squares, scratch);
  if (group == 0 && own < rows.channels) {
    mean[c] = merged;
    var[c] = squares * share;
  }
}

}  // namespace

int merge_moments(const MomentRows& rows, const Moments& moments, int64_t pixels, void* stream) {
  const dim3 grid(static_cast<unsigned>((rows.channels + kChannels - 1) / kChannels));
  return LAUNCH(merge, grid, dim3(kThreads), 0, stream, rows, static_cast<float*>(moments.mean),
                static_cast<float*>(moments.var), 1.0f / static_cast<float>(pixels));
}

}  // namespace fused_densenet
