// The block's input into its buffer, with moments, and a loaded gradient out of it: one side are channels-last pixels,
// the other an image in any strides. Tiles pass through shared memory, so that both sides are accessed along the
// dimension in which their neighbours lie. A thread reads a gradient before it writes the same place, so that a result
// may replace it. A block takes many tiles: its channels' vectors are read, and its moments left, once.
#include <algorithm>

#include "gradient.cuh"
#include "launch.h"
#include "moments.cuh"
#include "numbers.cuh"
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kPixels = 64, kChannels = 64, kThreads = 256;
constexpr int kBlocks = 3;  // on a multiprocessor, as many as registers allow

// How a side is accessed: lanes along pixels or along channels, whole aligned chunks or single elements.
struct Access {
  bool along_pixels, whole;
  bool even;      // pixels follow each other at one distance
  int64_t pixel;  // which is that
};

template <class T>
struct Tile {
  static constexpr int size = Chunk<T>::size, chunks = kChannels / size, units = kPixels * chunks;
  static constexpr int rows = kThreads / chunks;  // pixels that the block takes at a time where lanes go along channels
  static_assert(kThreads % chunks == 0 && kThreads % kPixels == 0 && 32 % chunks == 0 && kPixels % rows == 0);
  Chunk<T> data[kPixels][chunks];

  // Swizzled by pixel: chunks of neighbouring pixels lie in different banks, as those of neighbouring channels do.
  __device__ Chunk<T>& at(int pixel, int chunk) { return data[pixel][chunk ^ (pixel & 7)]; }
  static __device__ int own_chunk() { return static_cast<int>(threadIdx.x) % chunks; }
  static __device__ int own_row() { return static_cast<int>(threadIdx.x) / chunks; }
};

// Where the tile's pixels lie in the image, for the whole block.
struct Offsets {
  int64_t (&of)[kPixels];  // in shared memory; unused where pixels are even
  int64_t first, pixel;
  bool even;

  __device__ Offsets(int64_t (&of)[kPixels], const Shape& s, const Strided& image, const Access& access, int64_t first,
                     int pixels)
      : of(of), first(first), pixel(access.pixel), even(access.even) {
    if (even) return;
    if (static_cast<int>(threadIdx.x) < pixels) {
      int64_t i = first + threadIdx.x;
      const int64_t w = i % s.w, h = (i /= s.w) % s.h, d = (i /= s.h) % s.d, n = i / s.d;
      of[threadIdx.x] = n * image.stride[0] + d * image.stride[1] + h * image.stride[2] + w * image.stride[3];
    }
    __syncthreads();
  }
  __device__ int64_t operator[](int i) const { return even ? (first + i) * pixel : of[i]; }
};

// Calls body(pixel, chunk, channel, channels left) for this thread's share of the tile.
template <class T, class Body>
__device__ void for_each_chunk(bool along_pixels, int pixels, int64_t first_channel, int64_t channels, Body body) {
#pragma unroll 2
  for (int unit = threadIdx.x; unit < Tile<T>::units; unit += kThreads) {
    const int pixel = along_pixels ? unit % kPixels : unit / Tile<T>::chunks;
    const int chunk = along_pixels ? unit / kPixels : unit % Tile<T>::chunks;
    const int64_t channel = first_channel + chunk * Chunk<T>::size;
    if (pixel < pixels && channel < channels) body(pixel, chunk, channel, channels - channel);
  }
}

// body(first, pixels) for the block's tiles.
template <class Body>
__device__ void for_each_tile(const Shape& s, Body body) {
  const int64_t pixels = s.n * s.d * s.h * s.w;
  for (int64_t first = int64_t{blockIdx.x} * kPixels; first < pixels; first += int64_t{gridDim.x} * kPixels) {
    body(first, static_cast<int>(min(pixels - first, int64_t{kPixels})));
    __syncthreads();  // the tile has been read
  }
}

// Moments of all tiles of a block, a thread's share of its own chunk of channels: sums of distances from a pivot, which
// is the first tile's mean.
template <class T>
class TileMoments {
  static constexpr int size = Tile<T>::size, chunks = Tile<T>::chunks, warps = kThreads / 32;

 public:
  using Scratch = float[warps][kChannels];

  // For the whole block, after the barrier behind which the tile can be read.
  __device__ void add(Tile<T>& tile, int pixels, bool exists, Scratch& scratch) {
    if (count_ == 0) {
      for_own(tile, pixels, exists, [&](int j, float x) { pivot_[j] += x; });
      add_up(pivot_, scratch);
#pragma unroll
      for (int j = 0; j < size; ++j) pivot_[j] /= static_cast<float>(pixels);
    }
    for_own(tile, pixels, exists, [&](int j, float x) {
      const float d = x - pivot_[j];
      distance_[j] += d;
      squares_[j] = fmaf(d, d, squares_[j]);
    });
    count_ += pixels;
  }

  // As row blockIdx.x, merged if it is the last.
  __device__ void store(const MomentRows& rows, int64_t first_channel, Scratch& scratch) {
    add_up(distance_, scratch);
    add_up(squares_, scratch);
    const int64_t channel = first_channel + Tile<T>::own_chunk() * size;
    const float n = static_cast<float>(count_);
    for (int j = 0; j < size && Tile<T>::own_row() == 0 && channel + j < rows.channels; ++j) {
      const float mean = distance_[j] / n, m2 = squares_[j] - distance_[j] * mean;
      rows.set(blockIdx.x, channel + j, pivot_[j], mean, m2 < 0 ? 0 : m2, n);
    }
    merge_when_last(rows, static_cast<int>(blockIdx.x), first_channel, kChannels,
                    reinterpret_cast<unsigned*>(&scratch[0][0]));
  }

 private:
  template <class Body>
  __device__ void for_own(Tile<T>& tile, int pixels, bool exists, Body body) const {
#pragma unroll
    for (int i = 0; i < kPixels; i += Tile<T>::rows) {
      const int pixel = Tile<T>::own_row() + i;
      if (!exists || pixel >= pixels) break;
      float x[size];
      as_floats(x, tile.at(pixel, Tile<T>::own_chunk()));
#pragma unroll
      for (int j = 0; j < size; ++j) body(j, x[j]);
    }
  }

  // Over the threads that have the same channels; they all get the sums.
  static __device__ void add_up(float (&v)[size], Scratch& scratch) {
    const int lane = threadIdx.x & 31, warp = static_cast<int>(threadIdx.x) >> 5;
#pragma unroll
    for (int j = 0; j < size; ++j) {
#pragma unroll
      for (int other = chunks; other < 32; other *= 2) v[j] += __shfl_xor_sync(~0u, v[j], other);
      if (lane < chunks) scratch[warp][lane * size + j] = v[j];
    }
    __syncthreads();
    if (threadIdx.x < kChannels) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < warps; ++w) sum += scratch[w][threadIdx.x];
      scratch[0][threadIdx.x] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < size; ++j) v[j] = scratch[0][Tile<T>::own_chunk() * size + j];
    __syncthreads();
  }

  int count_ = 0;
  float pivot_[size] = {}, distance_[size] = {}, squares_[size] = {};
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) place_kernel(Place f, Access in, Access out, MomentRows rows) {
  __shared__ int64_t offsets_of[kPixels];
  __shared__ Tile<T> tile;
  __shared__ typename TileMoments<T>::Scratch scratch;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kChannels;
  const bool exists = first_channel + Tile<T>::own_chunk() * Chunk<T>::size < f.shape.out;
  const T* x = static_cast<const T*>(f.x.data);
  T* to = static_cast<T*>(f.out.data);
  TileMoments<T> moments;
  for_each_tile(f.shape, [&](int64_t first, int pixels) {
    const Offsets offsets(offsets_of, f.shape, f.x, in, first, pixels);
    for_each_chunk<T>(in.along_pixels, pixels, first_channel, f.shape.out,
                      [&](int pixel, int chunk, int64_t channel, int64_t left) {
                        const int64_t step = f.x.stride[4];
                        tile.at(pixel, chunk) = load_numbers(x + offsets[pixel] + channel * step, step, left, in.whole);
                      });
    __syncthreads();
    if (to != nullptr) {
      for_each_chunk<T>(out.along_pixels, pixels, first_channel, f.shape.out,
                        [&](int pixel, int chunk, int64_t channel, int64_t left) {
                          store_numbers(to + (first + pixel) * f.out.ld + channel, 1, left, out.whole,
                                        tile.at(pixel, chunk));
                        });
    }
    if (rows.data != nullptr) moments.add(tile, pixels, exists, scratch);
  });
  if (rows.data != nullptr) moments.store(rows, first_channel, scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    place_backward_kernel(PlaceBackward f, float slope, Access in, Access out) {
  __shared__ int64_t offsets_of[kPixels];
  __shared__ Tile<T> tile;
  constexpr int size = Chunk<T>::size;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kChannels;
  const int64_t channel = first_channel + Tile<T>::own_chunk() * size;
  const OwnGradient<T> gradient(f.grad, slope, channel, f.shape.out - channel, in.whole);
  T* to = static_cast<T*>(f.out.data);
  for_each_tile(f.shape, [&](int64_t first, int pixels) {
    const Offsets offsets(offsets_of, f.shape, f.out, out, first, pixels);
#pragma unroll
    for (int i = 0; i < kPixels; i += Tile<T>::rows) {
      const int pixel = Tile<T>::own_row() + i;
      if (pixel >= pixels || channel >= f.shape.out) break;
      float g[size];
      gradient.load(g, first + pixel);
      Chunk<T> loaded;
#pragma unroll
      for (int j = 0; j < size; ++j) loaded.element[j] = rounded<T>(g[j]);
      tile.at(pixel, Tile<T>::own_chunk()) = loaded;
    }
    __syncthreads();
    for_each_chunk<T>(
        out.along_pixels, pixels, first_channel, f.shape.out, [&](int pixel, int chunk, int64_t channel, int64_t left) {
          const int64_t step = f.out.stride[4];
          store_numbers(to + offsets[pixel] + channel * step, step, left, out.whole, tile.at(pixel, chunk));
        });
  });
}

template <class T>
Access access(const Pixels& pixels) {
  return {false, in_whole_chunks<T>(pixels.data, pixels.ld), true, pixels.ld};
}

template <class T>
Access access(const Shape& s, const Strided& image) {
  const int64_t step = image.stride[4];
  const bool one_channel = s.out == 1;
  const bool whole =
      step == 1 && in_whole_chunks<T>(image.data, s.n == 1 ? 0 : image.stride[0], s.d == 1 ? 0 : image.stride[1],
                                      s.h == 1 ? 0 : image.stride[2], s.w == 1 ? 0 : image.stride[3]);
  const int64_t pixel_step = s.w > 1 ? image.stride[3] : s.h > 1 ? image.stride[2] : image.stride[1];
  const int64_t pixel = s.w * s.h * s.d > 1 ? pixel_step : image.stride[0];
  const bool even = (s.h == 1 || image.stride[2] == s.w * pixel) &&
                    (s.d == 1 || image.stride[1] == s.h * s.w * pixel) &&
                    (s.n == 1 || image.stride[0] == s.d * s.h * s.w * pixel);
  return {one_channel || pixel_step < step, whole, even, pixel};
}

dim3 grid(const Shape& s, const Device& device) {
  const int64_t tiles = (s.pixels() + kPixels - 1) / kPixels, columns = (s.out + kChannels - 1) / kChannels;
  const int64_t at_once = std::max<int64_t>(1, int64_t{kBlocks} * device.multiprocessors / columns);
  return dim3(static_cast<unsigned>(std::min(tiles, at_once)), static_cast<unsigned>(columns));
}

MomentRows rows_of(const Place& f, const Device& device, void* prepared, void* workspace) {
  MomentRows rows = MomentRows::divided(grid(f.shape, device).x, f.moments, f.shape.out);
  if (f.moments.mean != nullptr) rows.data = static_cast<float*>(workspace);
  rows.counters = static_cast<unsigned*>(prepared);
  return rows;
}

template <class T>
int run(const Place& f, const Device& device, void* prepared, void* workspace, void* stream) {
  return LAUNCH(place_kernel<T>, grid(f.shape, device), dim3(kThreads), 0, stream, f, access<T>(f.shape, f.x),
                access<T>(f.out), rows_of(f, device, prepared, workspace));
}

template <class T>
int run(const PlaceBackward& f, const Device& device, void* stream) {
  Access in = access<T>(f.grad.stored);
  in.whole = in.whole && (f.grad.value.data == nullptr || access<T>(f.grad.value).whole);
  return LAUNCH(place_backward_kernel<T>, grid(f.shape, device), dim3(kThreads), 0, stream, f,
                gradient_slope_of(f.grad), in, access<T>(f.shape, f.out));
}

}  // namespace

Needs place_needs(const Place& f, Arithmetic, const Device& device) {
  const MomentRows rows = rows_of(f, device, nullptr, nullptr);
  const int64_t counters = rows.all_counters(grid(f.shape, device).y), bytes = counters * int64_t{sizeof(unsigned)};
  return {static_cast<size_t>((bytes + 255) / 256 * 256), rows.bytes(), {{}, nullptr, 0, counters}};
}

int place(const Place& f, Arithmetic arithmetic, const Device& device, void* prepared, void* workspace, void* stream) {
  if (f.shape.pixels() == 0) return cudaSuccess;
  switch (arithmetic) {
    case Arithmetic::bf16:
      return run<__nv_bfloat16>(f, device, prepared, workspace, stream);
    case Arithmetic::f16:
      return run<__half>(f, device, prepared, workspace, stream);
    default:
      return run<float>(f, device, prepared, workspace, stream);
  }
}

size_t place_backward_workspace(const PlaceBackward&, Arithmetic, const Device&) { return 0; }

int place_backward(const PlaceBackward& f, Arithmetic arithmetic, const Device& device, void*, void* stream) {
  if (f.shape.pixels() == 0) return cudaSuccess;
  switch (arithmetic) {
    case Arithmetic::bf16:
      return run<__nv_bfloat16>(f, device, stream);
    case Arithmetic::f16:
      return run<__half>(f, device, stream);
    default:
      return run<float>(f, device, stream);
  }
}

}  // namespace fused_densenet
