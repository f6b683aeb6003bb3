// Mean and biased variance per channel: every tile leaves (count, mean, M2) of what it stored, and one kernel merges
// them (Chan, Golub, LeVeque 1979, for any number of parts). Sums have a fixed order, so every run gives the same bits.
// A mean is two floats, `mean + drift`: of a channel around 1000 with deviation 1, the rounding of tiles' means to one
// would show in the variance's fifth digit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "ptx.cuh"

namespace fused_densenet {

// The tiles' moments in the workspace: for each row the mean, drift and M2 of every channel; then the rows' counts.
struct MomentRows {
  float* data;  // null where nobody asked for moments
  int64_t rows, channels;

  static size_t bytes(int64_t rows, int64_t channels) {
    return (static_cast<size_t>(rows) * (3 * channels + 1) * sizeof(float) + 255) / 256 * 256;
  }
  __host__ __device__ float* mean(int64_t row) const { return data + row * 3 * channels; }
  __host__ __device__ float* drift(int64_t row) const { return mean(row) + channels; }
  __host__ __device__ float* m2(int64_t row) const { return mean(row) + 2 * channels; }
  __host__ __device__ float* count(int64_t row) const { return data + rows * 3 * channels + row; }
};

// `rows.data` into `moments`, over all `pixels`; the returned cudaError_t as an int. moments.cu
int merge_moments(const MomentRows& rows, const Moments& moments, int64_t pixels, void* stream);

// Adds `part` over the threads that share a channel; they all get the sum. `scratch` holds Threads floats.
template <int Channels, int Threads>
__device__ float add_groups(float part, float* scratch) {
  constexpr int groups = Threads / Channels;
  if (groups == 1) return part;
  const int tid = threadIdx.x;
  if (tid < groups * Channels) scratch[tid] = part;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < groups; ++i) sum += scratch[i * Channels + tid % Channels];
  __syncthreads();
  return sum;
}

// Writes row `row` for channels [first, first + Channels) that exist. For a whole block of Threads threads, after the
// barrier behind which `value(pixel, channel)`, the number as stored, can be read for every pixel in [0, Pixels) with
// `valid(pixel)`, of which there are `count` > 0; channel counts from `first`. `scratch` is Threads floats of
// shared memory.
template <int Pixels, int Channels, int Threads, class Value, class Valid>
__device__ void tile_moments(const MomentRows& rows, int64_t row, int64_t first, int count, Value value, Valid valid,
                             float* scratch) {
  static_assert(Channels <= Threads);
  constexpr int groups = Threads / Channels;
  const int channel = threadIdx.x % Channels, group = threadIdx.x / Channels;
  const float share = 1.0f / static_cast<float>(count);
  float sum = 0;
  for (int p = group; p < Pixels && group < groups; p += groups) {
    if (valid(p)) sum += value(p, channel);
  }
  const float mean = add_groups<Channels, Threads>(sum, scratch) * share;
  float distance = 0, squares = 0;
  for (int p = group; p < Pixels && group < groups; p += groups) {
    if (!valid(p)) continue;
    const float d = value(p, channel) - mean;
    distance += d;
    squares = fmaf(d, d, squares);
  }
  distance = add_groups<Channels, Threads>(distance, scratch);
  squares = add_groups<Channels, Threads>(squares, scratch);
  if (group == 0 && first + channel < rows.channels) {
    rows.mean(row)[first + channel] = mean;
    rows.drift(row)[first + channel] = distance * share;
    const float m2 = squares - distance * distance * share;
    rows.m2(row)[first + channel] = m2 < 0 ? 0 : m2;  // NaN stays
  }
  if (threadIdx.x == 0 && first == 0) *rows.count(row) = static_cast<float>(count);
}

}  // namespace fused_densenet
