// What both forward convolutions do besides multiplying: tiles stored with their moments, and splits over channels
// added, in their order, by the last block to arrive of those that have the same tiles.
#pragma once

#include "launch.h"
#include "moments.cuh"
#include "operand.cuh"

namespace fused_densenet {

constexpr int kGroup = 16;  // output channels that are read together

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Where a tile goes: rounded into `out`, and before that, of splits over the input channels, into `partial`.
struct Output {
  unsigned char* data;
  int64_t pixel;  // bytes
  int channels, access;
  Bias bias;
  float slope;         // of what is stored
  float4* partial;     // a tile's sums by thread, [split][tile][block of columns]; null if there is one split
  int64_t of_split;    // how many
  unsigned* arrivals;  // of splits, for each block of tiles and of columns; prepared
  MomentRows moments;
};

// What a launch needs besides the kernel. Prepared memory is laid out as the packed weight, counters of arrivals, those
// of moments; the workspace as pooled activations, partial sums, moments.
struct ForwardPlan {
  Packing packing;
  MomentRows moments;
  int64_t of_split, arrivals, counters;
  size_t packed_bytes, pooled_bytes, partial_bytes;
  Needs needs() const {
    const Preparation preparation{packing, nullptr, static_cast<int64_t>(packed_bytes), counters};
    return {packed_bytes + aligned(counters * sizeof(unsigned)), pooled_bytes + partial_bytes + moments.bytes(),
            preparation};
  }
};

// forward.cu; `tile_sums`: all threads' sums of all tiles.
ForwardPlan plan_forward(const Forward& f, Arithmetic arithmetic, dim3 grid, int64_t tile_sums, const Packing& packing,
                         size_t pooled_bytes);
Output make_output(const Forward& f, int64_t element, const ForwardPlan& plan, void* prepared, void* workspace);

template <Arithmetic A>
struct Kind {
  static constexpr Arithmetic value = A;
};

// body(Kind<arithmetic>{}).
template <class Body>
auto with_arithmetic(Arithmetic arithmetic, Body body) {
  switch (arithmetic) {
    case Arithmetic::bf16:
      return body(Kind<Arithmetic::bf16>{});
    case Arithmetic::f16:
      return body(Kind<Arithmetic::f16>{});
    case Arithmetic::tf32:
      return body(Kind<Arithmetic::tf32>{});
    default:
      return body(Kind<Arithmetic::f32>{});
  }
}

// The input channels of one split, in bytes: their vectors stay in shared memory, and float32 sums stay short.
constexpr int kMostSplit = 4096;

// Moments of all tiles of a block, in shared memory: sums of distances from a pivot, which is the first tile's mean.
// Behind them the channels' bias, where there is one.
struct Statistics {
  float* data;
  int channels, parts;  // parts: warps that share the columns

  __host__ __device__ static size_t bytes(int channels, int parts, const Bias& bias) {
    return (3 + 2 * parts + (bias.data == nullptr ? 0 : 1)) * channels * sizeof(float);
  }
  __device__ float* pivot() const { return data; }
  __device__ float* distance() const { return data + channels; }
  __device__ float* squares() const { return data + 2 * channels; }
  __device__ float* part(int i, int which) const { return data + (3 + 2 * i + which) * channels; }

  // The bias of channels from `first` on, zero beyond the last; null where there is none.
  template <class T>
  __device__ const float* load_bias(const Output& o, int first) const {
    if (o.bias.data == nullptr) return nullptr;
    float* const to = part(parts, 0);
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
      to[c] = first + c < o.channels ? entry<T>(o.bias.data, o.bias.narrow, first + c) : 0.0f;
    }
    return to;
  }
};

// Of the first Entries of v, leaves in v[i] the sum over two lanes, which differ in bit Bit: of entry i in the lane
// where it is clear, of entry (Entries + 1) / 2 + i in the other.
template <int Entries, int Bit, int N>
__device__ __forceinline__ void exchange(float (&v)[N]) {
  constexpr int half = (Entries + 1) / 2;
  const bool upper = (threadIdx.x & Bit) != 0;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float low = v[i], high = i + half < Entries ? v[(i + half) % N] : 0.0f;
    v[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, Bit);
  }
}

// Adds over the eight lanes with the same lane % 4; calls put(entry, sum) for each entry, in one of them.
template <int N, class Put>
__device__ __forceinline__ void add_rows(float (&v)[N], Put put) {
  constexpr int first = (N + 1) / 2, second = (first + 1) / 2, third = (second + 1) / 2;
  exchange<N, 16>(v);
  exchange<first, 8>(v);
  exchange<second, 4>(v);
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < third; ++i) {
    const int in_second = i + (lane & 4 ? third : 0), in_first = in_second + (lane & 8 ? second : 0);
    const int entry = in_first + (lane & 16 ? first : 0);
    if (in_second < second && in_first < first && entry < N) put(entry, v[i]);
  }
}

// A warp's sums: MI tiles of 16 pixels by NT tiles of 8 channels, of which `columns` channels from `first` on exist;
// `local` is the first's place among the block's.
template <int MI, int NT>
struct WarpTile {
  float sum[MI][NT][4];
  int first, local, columns;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < MI * NT * 4; ++i) sum[i / (4 * NT)][i / 4 % NT][i % 4] = 0;
  }

  __device__ __forceinline__ void add(const WarpTile& other) {
#pragma unroll
    for (int i = 0; i < MI * NT * 4; ++i) {
      sum[i / (4 * NT)][i / 4 % NT][i % 4] += other.sum[i / (4 * NT)][i / 4 % NT][i % 4];
    }
  }

  template <class T>
  __host__ __device__ static constexpr int staging_pitch() {
    return (NT + 1) * 8 * int{sizeof(T)};
  }
  template <class T>
  __host__ __device__ static constexpr size_t staging_bytes() {
    return 16 * staging_pitch<T>();
  }

  // Of tile number `tile`, into the block's split.
  __device__ __forceinline__ void store_partial(const Output& o, int64_t tile) const {
    float4* const to = o.partial + blockIdx.z * o.of_split + place_of(tile);
#pragma unroll
    for (int i = 0; i < MI * NT; ++i) {
      const float (&own)[4] = sum[i / NT][i % NT];
      if (i % NT * 8 < columns) to[i * blockDim.x] = make_float4(own[0], own[1], own[2], own[3]);
    }
  }
  __device__ __forceinline__ void add_partials(const Output& o, int64_t tile) {
    const float4* from = o.partial + place_of(tile);
    for (unsigned split = 0; split < gridDim.z; ++split, from += o.of_split) {
#pragma unroll
      for (int i = 0; i < MI * NT; ++i) {
        if (i % NT * 8 >= columns) continue;
        const float4 more = __ldcg(from + i * blockDim.x);
        float (&own)[4] = sum[i / NT][i % NT];
        own[0] += more.x, own[1] += more.y, own[2] += more.z, own[3] += more.w;
      }
    }
  }

  // The sums of a tile before its first product: a block's bias in shared memory, null where there is none. Added here
  // it takes no register of its own.
  __device__ __forceinline__ void start(const float* bias) {
    if (bias == nullptr) {
      clear();
      return;
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const float2 own = j * 8 < columns ? load2(bias + local + 2 * (threadIdx.x & 3) + 8 * j) : float2{};
#pragma unroll
      for (int i = 0; i < 2 * MI; ++i) {
        sum[i / 2][j][2 * (i & 1)] = own.x;
        sum[i / 2][j][2 * (i & 1) + 1] = own.y;
      }
    }
  }

  __device__ __forceinline__ void activate(float slope) {
    if (slope == 1) return;
#pragma unroll
    for (int i = 0; i < MI * NT * 4; ++i) {
      float& own = sum[i / (4 * NT)][i / 4 % NT][i % 4];
      own = leaky(own, slope);
    }
  }

  // Rounds the sums to T and stores them, by way of `staging`, this warp's shared memory, as widely as they may be.
  // pixel(i, row) is where row `row` of tile i lies in the output, negative if it does not.
  template <class T, class PixelOf>
  __device__ __forceinline__ void store(const Output& o, unsigned char* staging, PixelOf pixel) {
    const int lane = threadIdx.x & 31, units = columns * int{sizeof(T)} / o.access;
    unsigned char* own = staging + (lane >> 2) * staging_pitch<T>() + 2 * (lane & 3) * sizeof(T);
#pragma unroll
    for (int i = 0; i < MI; ++i) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          float &low = sum[i][j][e], &high = sum[i][j][e + 1];
          low = as_float(rounded<T>(low));
          high = as_float(rounded<T>(high));
          store2(reinterpret_cast<T*>(own + e / 2 * 8 * staging_pitch<T>()) + 8 * j, low, high);
        }
      }
      __syncwarp();
      for (int u = lane; u < 16 * units; u += 32) {
        const int turn = u / units, at = (u - turn * units) * o.access;
        const int row = o.access == 16 ? row_of_turn<sizeof(T) == 2 ? 8 : 4>(turn, units) : turn;
        const int64_t p = pixel(i, row);
        if (p < 0) continue;
        unsigned char* to = o.data + p * o.pixel + first * int64_t{sizeof(T)} + at;
        const unsigned char* from = staging + row * staging_pitch<T>() + at;
        if (o.access == 16) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else if (o.access == 8) {
          *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
        } else if (o.access == 4) {
          *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(from);
        } else {
          *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
        }
      }
      __syncwarp();
    }
  }

  // Adds the stored sums' moments to the block's. For the whole block; `count` pixels are in the block's tile, `part`
  // is this warp's place among those that share its columns.
  template <class PixelOf>
  __device__ __forceinline__ void add_moments(const Statistics& s, int part, bool first_tile, int count,
                                              PixelOf pixel) {
    const int lane = threadIdx.x & 31, column = local + 2 * (lane & 3);
    uint32_t valid = 0;
#pragma unroll
    for (int i = 0; i < 2 * MI; ++i) valid |= (pixel(i / 2, (lane >> 2) + 8 * (i & 1)) >= 0 ? 1u : 0u) << i;
    float v[2 * NT];
    if (first_tile) {
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        v[c] = 0;
#pragma unroll
        for (int i = 0; i < 2 * MI; ++i) v[c] += valid >> i & 1 ? sum[i / 2][c / 2][2 * (i & 1) + (c & 1)] : 0.0f;
      }
      add_rows(v, [&](int c, float total) { put(s.part(part, 0), c, column, total); });
      __syncthreads();
      for (int c = threadIdx.x; c < s.channels; c += blockDim.x) {
        float total = 0;
        for (int i = 0; i < s.parts; ++i) total += s.part(i, 0)[c];
        s.pivot()[c] = total / static_cast<float>(count);
        s.distance()[c] = s.squares()[c] = 0;
      }
      __syncthreads();
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int c = 0; c < 2 * NT; ++c) {
        const float pivot = c / 2 * 8 < columns ? s.pivot()[column + c / 2 * 8 + (c & 1)] : 0.0f;
        v[c] = 0;
#pragma unroll
        for (int i = 0; i < 2 * MI; ++i) {
          const float d = valid >> i & 1 ? sum[i / 2][c / 2][2 * (i & 1) + (c & 1)] - pivot : 0.0f;
          v[c] = which == 0 ? v[c] + d : fmaf(d, d, v[c]);
        }
      }
      add_rows(v, [&](int c, float total) { put(s.part(part, which), c, column, total); });
    }
    __syncthreads();
    for (int c = threadIdx.x; c < s.channels; c += blockDim.x) {
      for (int i = 0; i < s.parts; ++i) {
        s.distance()[c] += s.part(i, 0)[c];
        s.squares()[c] += s.part(i, 1)[c];
      }
    }
  }

 private:
  // Of this thread's first sums in a split.
  __device__ __forceinline__ int64_t place_of(int64_t tile) const {
    return (tile * gridDim.y + blockIdx.y) * (MI * NT * blockDim.x) + threadIdx.x;
  }
  __device__ __forceinline__ void put(float* to, int c, int column, float total) const {
    if (c / 2 * 8 < columns) to[column + c / 2 * 8 + (c & 1)] = total;
  }
};

// For a block whose sums are all stored: whether it is the last of its splits, which adds them up.
__device__ inline bool adds_splits(const Output& o, unsigned* scratch) {
  if (!comes_last(o.arrivals + blockIdx.y * gridDim.x + blockIdx.x, static_cast<int>(gridDim.z), scratch)) return false;
  __syncthreads();  // scratch has been read
  return true;
}

// Row `row` of the moments, from a block's statistics of channels [first, first + s.channels) over `count` pixels;
// merged if it is the last.
__device__ inline void store_statistics(const Statistics& s, const MomentRows& rows, int row, int first, int count) {
  __syncthreads();
  const float n = static_cast<float>(count);
  for (int c = threadIdx.x; c < s.channels && first + c < rows.channels; c += blockDim.x) {
    const float m2 = s.squares()[c] - s.distance()[c] * (s.distance()[c] / n);
    rows.set(row, first + c, s.pivot()[c], s.distance()[c] / n, m2 < 0 ? 0 : m2, n);
  }
  merge_when_last(rows, row, first, s.channels, reinterpret_cast<unsigned*>(s.part(0, 0)));
}

}  // namespace fused_densenet
