// Mean and biased variance per channel: every block leaves (count, mean, M2) of what it stored in a row, and they are
// merged (Chan, Golub, LeVeque 1979, for any number of parts) by the last block to arrive: the rows in groups, then the
// groups. Which block that is differs from run to run; the order of the sums does not, so every run gives the same
// bits. A mean is two floats, `mean + drift`: of a channel around 1000 with deviation 1, the rounding of tiles' means
// to one would show in the variance's fifth digit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "ptx.cuh"

namespace fused_densenet {

// Rows of blocks' moments in the workspace: the mean, drift, M2 and count of every channel; behind them the groups'.
struct MomentRows {
  float* data;         // null where nobody asked for moments
  unsigned* counters;  // for each column of blocks one of each group, and one of the groups; prepared
  Moments moments;     // where they go
  int64_t channels;
  int rows, in_group, groups;

  // Of `rows` rows; groups of as many rows as there are groups, so that a block merges few.
  __host__ static MomentRows divided(int64_t rows, const Moments& moments, int64_t channels) {
    MomentRows r{nullptr, nullptr, moments, channels, static_cast<int>(rows), 1, 0};
    while (int64_t{r.in_group} * r.in_group < rows) ++r.in_group;
    r.groups = (r.rows + r.in_group - 1) / r.in_group;
    return r;
  }
  size_t bytes() const {
    const size_t bytes = static_cast<size_t>(rows + groups) * 4 * static_cast<size_t>(channels) * sizeof(float);
    return moments.mean == nullptr ? 0 : (bytes + 255) / 256 * 256;
  }
  int64_t all_counters(int64_t columns) const { return moments.mean == nullptr ? 0 : columns * (groups + 1); }

  __device__ float* mean(int64_t row) const { return data + row * 4 * channels; }
  __device__ float* drift(int64_t row) const { return mean(row) + channels; }
  __device__ float* m2(int64_t row) const { return mean(row) + 2 * channels; }
  __device__ float* count(int64_t row) const { return mean(row) + 3 * channels; }

  __device__ void set(int64_t row, int64_t channel, float own_mean, float own_drift, float own_m2,
                      float own_count) const {
    mean(row)[channel] = own_mean;
    drift(row)[channel] = own_drift;
    m2(row)[channel] = own_m2;
    count(row)[channel] = own_count;
  }
};

// Whether this block is the last of so many to come here, whose writes it then sees. `scratch` is in shared memory.
__device__ inline bool comes_last(unsigned* counter, int blocks, unsigned* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *scratch = atomicAdd(counter, 1u);
  __syncthreads();
  const bool last = *scratch == static_cast<unsigned>(blocks - 1);
  if (last) __threadfence();
  return last;
}

// put(mean, drift, M2, count) of rows [begin, end) of a channel. Distances are from the first row's mean: of rows as
// many as there are here they cancel by no more than their number.
template <class Put>
__device__ void merge_rows(const MomentRows& rows, int begin, int end, int64_t channel, Put put) {
  const float pivot = __ldcg(rows.mean(begin) + channel);
  float count = 0, distance = 0, squares = 0;
#pragma unroll 8
  for (int row = begin; row < end; ++row) {
    const float n = __ldcg(rows.count(row) + channel);
    const float d = __ldcg(rows.mean(row) + channel) - pivot + __ldcg(rows.drift(row) + channel);
    count += n;
    distance = fmaf(n, d, distance);
    squares += fmaf(n * d, d, __ldcg(rows.m2(row) + channel));
  }
  distance /= count;
  const float m2 = squares - distance * distance * count;
  put(pivot, distance, m2 < 0 ? 0 : m2, count);  // NaN stays
}

// For all threads of a block that has written row `row` of channels [first, first + channels), and that no thread is
// still writing; a column of blocks has the channels of its own.
__device__ inline void merge_when_last(const MomentRows& rows, int row, int64_t first, int channels,
                                       unsigned* scratch) {
  unsigned* const counters = rows.counters + blockIdx.y * (rows.groups + 1);
  const int group = row / rows.in_group, begin = group * rows.in_group;
  const int end = begin + rows.in_group < rows.rows ? begin + rows.in_group : rows.rows;
  const auto each = [&](auto merge) {
    for (int c = threadIdx.x; c < channels && first + c < rows.channels; c += blockDim.x) merge(first + c);
  };
  if (!comes_last(counters + group, end - begin, scratch)) return;
  each([&](int64_t c) {
    merge_rows(rows, begin, end, c, [&](float mean, float drift, float m2, float count) {
      rows.set(rows.rows + group, c, mean, drift, m2, count);
    });
  });
  if (!comes_last(counters + rows.groups, rows.groups, scratch)) return;
  each([&](int64_t c) {
    merge_rows(rows, rows.rows, rows.rows + rows.groups, c, [&](float mean, float drift, float m2, float count) {
      static_cast<float*>(rows.moments.mean)[c] = mean + drift;
      static_cast<float*>(rows.moments.var)[c] = m2 / count;
    });
  });
}

}  // namespace fused_densenet
