// The block's input into its buffer, with moments, and a loaded gradient out of it: one side are channels-last pixels,
// the other an image in any strides. Tiles pass through shared memory, so that both sides are accessed along the
// dimension in which their neighbours lie. A thread reads a gradient before it writes the same place, so that a result
// may replace it.
#include "gradient.cuh"
#include "launch.h"
#include "moments.cuh"
#include "numbers.cuh"
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kPixels = 64, kChannels = 64, kThreads = 256;

// How a side is accessed: lanes along pixels or along channels, whole aligned chunks or single elements.
struct Access {
  bool along_pixels, whole;
};

template <class T>
struct Tile {
  static constexpr int chunks = kChannels / Chunk<T>::size, units = kPixels * chunks;
  static_assert(kThreads % chunks == 0 && kThreads % kPixels == 0);
  Chunk<T> data[kPixels][chunks];

  // Swizzled by pixel: chunks of neighbouring pixels lie in different banks, as those of neighbouring channels do.
  __device__ Chunk<T>& at(int pixel, int chunk) { return data[pixel][chunk ^ (pixel & 7)]; }
};

// Where the tile's pixels lie in the image, for the whole block.
__device__ void pixel_offsets(int64_t (&offsets)[kPixels], const Shape& s, const Strided& image, int64_t first,
                              int pixels) {
  if (static_cast<int>(threadIdx.x) < pixels) {
    int64_t i = first + threadIdx.x;
    const int64_t w = i % s.w, h = (i /= s.w) % s.h, d = (i /= s.h) % s.d, n = i / s.d;
    offsets[threadIdx.x] = n * image.stride[0] + d * image.stride[1] + h * image.stride[2] + w * image.stride[3];
  }
  __syncthreads();
}

// Calls body(pixel, chunk, channel, channels left) for this thread's share of the tile.
template <class T, class Body>
__device__ void for_each_chunk(bool along_pixels, int pixels, int64_t first_channel, int64_t channels, Body body) {
  for (int unit = threadIdx.x; unit < Tile<T>::units; unit += kThreads) {
    const int pixel = along_pixels ? unit % kPixels : unit / Tile<T>::chunks;
    const int chunk = along_pixels ? unit / kPixels : unit % Tile<T>::chunks;
    const int64_t channel = first_channel + chunk * Chunk<T>::size;
    if (pixel < pixels && channel < channels) body(pixel, chunk, channel, channels - channel);
  }
}

__device__ int pixels_of_tile(const Shape& s, int64_t first) {
  const int64_t left = s.n * s.d * s.h * s.w - first;
  return static_cast<int>(left < kPixels ? left : kPixels);
}

template <class T>
__global__ void __launch_bounds__(kThreads) place_kernel(Place f, Access in, Access out, MomentRows rows) {
  __shared__ int64_t offsets[kPixels];
  __shared__ Tile<T> tile;
  __shared__ float scratch[kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPixels;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kChannels;
  const int pixels = pixels_of_tile(f.shape, first);
  const T* x = static_cast<const T*>(f.x.data);
  T* to = static_cast<T*>(f.out.data);
  pixel_offsets(offsets, f.shape, f.x, first, pixels);
  for_each_chunk<T>(in.along_pixels, pixels, first_channel, f.shape.out,
                    [&](int pixel, int chunk, int64_t channel, int64_t left) {
                      const int64_t step = f.x.stride[4];
                      tile.at(pixel, chunk) = load_numbers(x + offsets[pixel] + channel * step, step, left, in.whole);
                    });
  __syncthreads();
  if (to != nullptr) {
    for_each_chunk<T>(
        out.along_pixels, pixels, first_channel, f.shape.out, [&](int pixel, int chunk, int64_t channel, int64_t left) {
          store_numbers(to + (first + pixel) * f.out.ld + channel, 1, left, out.whole, tile.at(pixel, chunk));
        });
  }
  if (rows.data == nullptr) return;
  tile_moments<kPixels, kChannels, kThreads>(
      rows, static_cast<int>(blockIdx.x), first_channel, pixels,
      [&](int pixel, int channel) {
        return as_float(tile.at(pixel, channel / Chunk<T>::size).element[channel % Chunk<T>::size]);
      },
      [&](int pixel) { return pixel < pixels; }, scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads) place_backward_kernel(PlaceBackward f, float slope, Access in, Access out) {
  __shared__ int64_t offsets[kPixels];
  __shared__ Tile<T> tile;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPixels;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kChannels;
  const int pixels = pixels_of_tile(f.shape, first);
  T* to = static_cast<T*>(f.out.data);
  pixel_offsets(offsets, f.shape, f.out, first, pixels);
  for_each_chunk<T>(in.along_pixels, pixels, first_channel, f.shape.out,
                    [&](int pixel, int chunk, int64_t channel, int64_t left) {
                      float g[Chunk<T>::size];
                      load_gradient<T>(g, f.grad, slope, first + pixel, channel, left, in.whole);
                      Chunk<T> loaded;
#pragma unroll
                      for (int i = 0; i < Chunk<T>::size; ++i) loaded.element[i] = rounded<T>(g[i]);
                      tile.at(pixel, chunk) = loaded;
                    });
  __syncthreads();
  for_each_chunk<T>(out.along_pixels, pixels, first_channel, f.shape.out,
                    [&](int pixel, int chunk, int64_t channel, int64_t left) {
                      const int64_t step = f.out.stride[4];
                      store_numbers(to + offsets[pixel] + channel * step, step, left, out.whole, tile.at(pixel, chunk));
                    });
}

template <class T>
Access access(const Pixels& pixels) {
  return {false, in_whole_chunks<T>(pixels.data, pixels.ld)};
}

template <class T>
Access access(const Shape& s, const Strided& image) {
  const int64_t step = image.stride[4];
  const bool one_channel = s.out == 1;
  const bool whole =
      step == 1 && in_whole_chunks<T>(image.data, s.n == 1 ? 0 : image.stride[0], s.d == 1 ? 0 : image.stride[1],
                                      s.h == 1 ? 0 : image.stride[2], s.w == 1 ? 0 : image.stride[3]);
  const int64_t pixel_step = s.w > 1 ? image.stride[3] : s.h > 1 ? image.stride[2] : image.stride[1];
  return {one_channel || pixel_step < step, whole};
}

int64_t tiles(const Shape& s) { return (s.pixels() + kPixels - 1) / kPixels; }

dim3 grid(const Shape& s) {
  return dim3(static_cast<unsigned>(tiles(s)), static_cast<unsigned>((s.out + kChannels - 1) / kChannels));
}

MomentRows rows_of(const Place& f, void* prepared, void* workspace) {
  MomentRows rows = MomentRows::divided(tiles(f.shape), f.moments, f.shape.out);
  if (f.moments.mean != nullptr) rows.data = static_cast<float*>(workspace);
  rows.counters = static_cast<unsigned*>(prepared);
  return rows;
}

template <class T>
int run(const Place& f, void* prepared, void* workspace, void* stream) {
  return LAUNCH(place_kernel<T>, grid(f.shape), dim3(kThreads), 0, stream, f, access<T>(f.shape, f.x), access<T>(f.out),
                rows_of(f, prepared, workspace));
}

template <class T>
int run(const PlaceBackward& f, void* stream) {
  Access in = access<T>(f.grad.stored);
  in.whole = in.whole && (f.grad.value.data == nullptr || access<T>(f.grad.value).whole);
  return LAUNCH(place_backward_kernel<T>, grid(f.shape), dim3(kThreads), 0, stream, f, gradient_slope_of(f.grad), in,
                access<T>(f.shape, f.out));
}

}  // namespace

Needs place_needs(const Place& f, Arithmetic, const Device&) {
  const MomentRows rows = rows_of(f, nullptr, nullptr);
  const int64_t counters = rows.all_counters(grid(f.shape).y), bytes = counters * int64_t{sizeof(unsigned)};
  return {static_cast<size_t>((bytes + 255) / 256 * 256), rows.bytes(), {{}, nullptr, 0, counters}};
}

int place(const Place& f, Arithmetic arithmetic, const Device&, void* prepared, void* workspace, void* stream) {
  if (f.shape.pixels() == 0) return cudaSuccess;
  switch (arithmetic) {
    case Arithmetic::bf16:
      return run<__nv_bfloat16>(f, prepared, workspace, stream);
    case Arithmetic::f16:
      return run<__half>(f, prepared, workspace, stream);
    default:
      return run<float>(f, prepared, workspace, stream);
  }
}

size_t place_backward_workspace(const PlaceBackward&, Arithmetic, const Device&) { return 0; }

int place_backward(const PlaceBackward& f, Arithmetic arithmetic, const Device&, void*, void* stream) {
  if (f.shape.pixels() == 0) return cudaSuccess;
  switch (arithmetic) {
    case Arithmetic::bf16:
      return run<__nv_bfloat16>(f, stream);
    case Arithmetic::f16:
      return run<__half>(f, stream);
    default:
      return run<float>(f, stream);
  }
}

}  // namespace fused_densenet
