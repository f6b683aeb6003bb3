// Activations, leaky(norm(x)), or a stem's: of relu(norm(x)) the maxima over windows of 3, stride 2, one pixel of
// padding; and the gradient back, for which the places of the maxima are found again.
//
// A block takes a box of 64 windows and, of the gradient, the pixels 2 w and 2 w + 1 of each; a thread some of them, of
// its own 16 bytes of channels. Pixel 2 w + 1 lies in the next window, too: the gradient finds the maxima of the box
// and of its neighbours behind it, leaves their places in shared memory, and then each pixel gathers what its windows
// have for it. So all is written once, by one thread, in an order that does not change.
#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "boxes.cuh"
#include "launch.h"
#include "numbers.cuh"
#include "operand.cuh"
#include "partials.cuh"
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 256, kWindows = 64, kMostLanes = 8;
constexpr int kBlocks = 4;  // of the gradient, on a multiprocessor: each leaves sums
constexpr int kNowhere = 255;

// Windows of Dims dimensions; of none, a window is a pixel.
template <int Dims>
struct Windows {
  static constexpr int side = Dims == 3 ? 4 : Dims == 2 ? 8 : 64;
  static constexpr int all = Dims == 3 ? 5 * 5 * 5 : Dims == 2 ? 9 * 9 : 65;
  static constexpr int reach_d = Dims == 3 ? 3 : 1, reach_h = Dims >= 2 ? 3 : 1, reach_w = Dims >= 1 ? 3 : 1;  // pixels
  __host__ __device__ static constexpr Box box() { return {1, Dims == 3 ? side : 1, Dims >= 2 ? side : 1, side}; }
  __device__ static constexpr Box with_next() { return {1, box().d + Dims / 3, box().h + Dims / 2, side + 1}; }
};

// Images, their windows and boxes of windows; of no dimensions, one row of pixels.
struct Images {
  Box pixels, windows, boxes;
};

__device__ __forceinline__ bool inside(const Box& sizes, const Box& at) {
  const auto is = [](int at, int size) { return static_cast<unsigned>(at) < static_cast<unsigned>(size); };
  return is(at.d, sizes.d) && is(at.h, sizes.h) && is(at.w, sizes.w);
}

__device__ __forceinline__ Box first_window(const Images& images, const Box& box, int i) {
  const Box at = place_in(images.boxes, i);
  return {at.n, at.d * box.d, at.h * box.h, at.w * box.w};
}

__device__ __forceinline__ Box moved(const Box& first, const Box& by) {
  return {first.n, first.d + by.d, first.h + by.h, first.w + by.w};
}

// body(number, pixel) for the pixels of a window, in the order of memory.
template <int Dims, class Body>
__device__ __forceinline__ void for_each_pixel(const Box& image, const Box& window, Body body) {
  using W = Windows<Dims>;
  const auto place = [](int at, int i, int reach) { return reach == 1 ? at : 2 * at - 1 + i; };
#pragma unroll 1
  for (int d = 0; d < W::reach_d; ++d) {
#pragma unroll
    for (int h = 0; h < W::reach_h; ++h) {
#pragma unroll
      for (int w = 0; w < W::reach_w; ++w) {
        const Box pixel{window.n, place(window.d, d, W::reach_d), place(window.h, h, W::reach_h),
                        place(window.w, w, W::reach_w)};
        if (inside(image, pixel)) body((d * W::reach_h + h) * W::reach_w + w, index_in(image, pixel));
      }
    }
  }
}

// Which chunk of channels a thread has, and which of the rows of windows or pixels that its block takes at a time.
template <class T>
struct Own {
  int lanes, lane, row, rows;
  int64_t channel, left;

  __device__ Own(int64_t channels, int lanes)
      : lanes(lanes),
        lane(threadIdx.x % lanes),
        row(threadIdx.x / lanes),
        rows(kThreads / lanes),
        channel((int64_t{blockIdx.y} * lanes + lane) * Chunk<T>::size),
        left(channels - channel) {}
};

// A thread's channels of an image, pixel by pixel; the launch has made sure that the bytes of a pixel fit.
template <class T>
struct OwnPixels {
  unsigned char* data;
  int step;  // bytes
  int64_t left;
  bool whole;

  __device__ OwnPixels(const Pixels& image, const Own<T>& own, bool whole)
      : data(static_cast<unsigned char*>(const_cast<void*>(image.data)) + own.channel * int64_t{sizeof(T)}),
        step(static_cast<int>(image.ld * int64_t{sizeof(T)})),
        left(own.left),
        whole(whole) {}

  __device__ T* at(int pixel) const {
    return reinterpret_cast<T*>(const_cast<unsigned char*>(bytes_behind(data, pixel, step)));
  }
  // The bits of a chunk: compilers would take words apart that may have come in parts.
  __device__ uint4 load(int pixel) const {
    if (whole && left >= Chunk<T>::size) return *reinterpret_cast<const uint4*>(at(pixel));
    return __builtin_bit_cast(uint4, load_numbers(at(pixel), 1, left, false));
  }
  __device__ void store(int pixel, const Chunk<T>& values) const { store_numbers(at(pixel), 1, left, whole, values); }
};

// A norm's vectors of a chunk; zero beyond the last channel.
template <class T>
struct OwnNorm {
  static constexpr int size = Chunk<T>::size;
  const float slope;
  float mean[size], scale[size], shift[size];

  __device__ OwnNorm(const Norm& norm, const Own<T>& own) : slope(static_cast<float>(norm.negative_slope)) {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const ChannelNorm<T> entry = i < own.left ? ChannelNorm<T>(norm, own.channel + i) : ChannelNorm<T>();
      mean[i] = entry.mean;
      scale[i] = entry.scale;
      shift[i] = entry.shift;
    }
  }
  __device__ float before_activation(float x, int i) const { return normalised(x, mean[i], scale[i], shift[i]); }
};

template <class T, int Dims>
__global__ void __launch_bounds__(kThreads, 3)
    norm_relu_pool_kernel(NormReluPool f, Images images, int lanes, bool whole_x, bool whole_out) {
  const Own<T> own(f.shape.in, lanes);
  if (own.left <= 0) return;
  const OwnNorm<T> norm(f.norm, own);
  const OwnPixels<T> x(f.x, own, whole_x), out(f.out, own, whole_out);
  const Box first = first_window(images, Windows<Dims>::box(), blockIdx.x);
  for (int i = own.row; i < kWindows; i += own.rows) {
    const Box window = moved(first, place_in(Windows<Dims>::box(), i));
    if (!inside(images.windows, window)) continue;
    float largest[Chunk<T>::size] = {};
    for_each_pixel<Dims>(images.pixels, window, [&](int, int pixel) {
      float in[Chunk<T>::size];
      as_floats<T>(in, x.load(pixel));
#pragma unroll
      for (int j = 0; j < Chunk<T>::size; ++j) {
        const float z = norm.before_activation(in[j], j);
        largest[j] = Dims == 0 && norm.slope != 0 ? Leaky{norm.slope}(z) : maximum(largest[j], z);
      }
    });
    Chunk<T> result;
#pragma unroll
    for (int j = 0; j < Chunk<T>::size; ++j) result.element[j] = rounded<T>(largest[j]);
    out.store(index_in(images.windows, window), result);
  }
}

// The number of the pixel that a window's maximum comes from, for each channel of a chunk: bytes of words.
template <class T>
struct alignas(Chunk<T>::size) Places {
  static constexpr int words = Chunk<T>::size / 4;
  unsigned of[words];

  __device__ void set(int channel, int number) {
    of[channel / 4] = (channel % 4 == 0 ? 0u : of[channel / 4]) | static_cast<unsigned>(number) << 8 * (channel % 4);
  }
  // All bits of the bytes that are `number`; numbers are below 128 or kNowhere, which is none.
  __device__ Places are(int number) const {
    Places found;
#pragma unroll
    for (int i = 0; i < words; ++i) {
      const unsigned differs = of[i] ^ static_cast<unsigned>(number) * 0x01010101u;
      const unsigned same = ~(((differs & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | differs) & 0x80808080u;
      found.of[i] = (same >> 7) * 0xFFu;
    }
    return found;
  }
  __device__ bool any() const { return of[0] != 0 || of[words - 1] != 0; }
  // The bits of a chunk's numbers whose bytes are set, zero in the others.
  __device__ uint4 cut(const uint4& bits) const {
    return make_uint4(bits.x & mask(0), bits.y & mask(1), bits.z & mask(2), bits.w & mask(3));
  }

 private:
  // Of a chunk's word, a number or two.
  __device__ unsigned mask(int word) const {
    return sizeof(T) == 2 ? bytes_of(of[word / 2 % words], word % 2 ? 0x3322 : 0x1100) : bytes_of(of[0], 0x1111 * word);
  }
};

template <class T, int Dims>
class PoolBackward {
  static constexpr int size = Chunk<T>::size;

 public:
  struct Shared {
    Places<T> places[Windows<Dims>::all][kMostLanes];
    float sums[size][kThreads + kMostLanes];
  };

  __device__ PoolBackward(const NormReluPoolBackward& f, const Images& images, int lanes, bool whole, Shared& shared)
      : f_(f),
        images_(images),
        shared_(shared),
        own_(f.shape.in, lanes),
        x_(f.x, own_, whole),
        grad_(f.grad, own_, whole),
        dx_(f.dx, own_, whole),
        norm_(f.norm, own_) {}

  __device__ void run(float* partials) {
    const int boxes = images_.boxes.volume();
    for (int box = blockIdx.x; box < boxes; box += gridDim.x) {
      const Box first = first_window(images_, Windows<Dims>::box(), box);
      if constexpr (Dims > 0) {
        __syncthreads();  // the last box's places have been read
        if (own_.left > 0) find_maxima(first);
        __syncthreads();
      }
      if (own_.left > 0) gather(first);
    }
    float* const own_partials = partials + int64_t{blockIdx.x} * 2 * f_.shape.in;
    store_sums(sum_, own_partials);
    store_sums(sum_centered_, own_partials + f_.shape.in);
  }

 private:
  // The first of equals, the last NaN; nowhere if ReLU lets nothing pass.
  __device__ void find_maxima(const Box& first) {
    for (int i = own_.row; i < Windows<Dims>::all; i += own_.rows) {
      const Box window = moved(first, place_in(Windows<Dims>::with_next(), i));
      float largest[size] = {};
      int place[size];
#pragma unroll
      for (int j = 0; j < size; ++j) place[j] = kNowhere;
      if (inside(images_.windows, window)) {
        for_each_pixel<Dims>(images_.pixels, window, [&](int number, int pixel) {
          float in[size];
          as_floats<T>(in, x_.load(pixel));
#pragma unroll
          for (int j = 0; j < size; ++j) {
            const float z = norm_.before_activation(in[j], j);
            const bool larger = z > largest[j] || z != z;
            largest[j] = larger ? z : largest[j];
            place[j] = larger ? number : place[j];
          }
        });
      }
      Places<T> found;
#pragma unroll
      for (int j = 0; j < size; ++j) found.set(j, place[j]);
      shared_.places[i][own_.lane] = found;
    }
  }

  // Pixels in the order of which side of their windows they are on: a warp's pixels have as many windows.
  __device__ void gather(const Box& first) {
    for (int i = own_.row; i < kWindows << Dims; i += own_.rows) {
      const int side = i / kWindows, d = Dims == 3 ? side >> 2 : 0, h = side >> 1 & 1, w = side & 1;
      const Box in_box = place_in(Windows<Dims>::box(), i % kWindows);
      Box pixel = moved(first, in_box);
      if constexpr (Dims == 3) pixel.d = 2 * pixel.d + d;
      if constexpr (Dims >= 2) pixel.h = 2 * pixel.h + h;
      if constexpr (Dims >= 1) pixel.w = 2 * pixel.w + w;
      if (!inside(images_.pixels, pixel)) continue;
      const int at = index_in(images_.pixels, pixel);
      float in[size], dz[size] = {};
      as_floats<T>(in, x_.load(at));
      if constexpr (Dims == 0) {
        as_floats<T>(dz, grad_.load(at));
#pragma unroll
        for (int j = 0; j < size; ++j) dz[j] = norm_.before_activation(in[j], j) <= 0 ? lost(dz[j]) : dz[j];
      } else {
        for (int next_d = 0; next_d <= d; ++next_d) {
          for (int next_h = 0; next_h <= h; ++next_h) {
            for (int next_w = 0; next_w <= w; ++next_w) {
              const Box window{0, in_box.d + next_d, in_box.h + next_h, in_box.w + next_w};
              using W = Windows<Dims>;
              const int row = number_of(W::reach_d, d, next_d) * W::reach_h + number_of(W::reach_h, h, next_h);
              const int number = row * W::reach_w + number_of(W::reach_w, w, next_w);
              add_maxima(dz, first, window, number);
            }
          }
        }
      }
      Chunk<T> result;
#pragma unroll
      for (int j = 0; j < size; ++j) {
        sum_[j] += dz[j];
        sum_centered_[j] = fmaf(dz[j], in[j] - norm_.mean[j], sum_centered_[j]);
        result.element[j] = rounded<T>(norm_.scale[j] * dz[j]);
      }
      dx_.store(at, result);
    }
  }

  // What the activation lets through of a gradient at a negative number.
  __device__ float lost(float gradient) const { return norm_.slope == 0 ? 0.0f : norm_.slope * gradient; }

  // Which of a window's pixels in one dimension is pixel 2 w + side: of window w, or of the next.
  static __device__ int number_of(int reach, int side, int next) { return reach == 1 || next ? 0 : 1 + side; }

  __device__ void add_maxima(float (&dz)[size], const Box& first, const Box& window, int number) const {
    const Places<T> wanted = shared_.places[index_in(Windows<Dims>::with_next(), window)][own_.lane].are(number);
    if (!wanted.any()) return;
    float grad[size];
    as_floats<T>(grad, wanted.cut(grad_.load(index_in(images_.windows, moved(first, window)))));
#pragma unroll
    for (int j = 0; j < size; ++j) dz[j] += grad[j];
  }

  // Adds over the threads that share a channel.
  __device__ void store_sums(const float (&sums)[size], float* to) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < size; ++j) shared_.sums[j][threadIdx.x] = sums[j];
    __syncthreads();
    const int lane = threadIdx.x % own_.lanes, j = threadIdx.x / own_.lanes;
    if (j >= size || own_.left <= j) return;
    float sum = 0;
    for (int row = 0; row < own_.rows; ++row) sum += shared_.sums[j][row * own_.lanes + lane];
    to[own_.channel + j] = sum;
  }

  const NormReluPoolBackward& f_;
  const Images& images_;
  Shared& shared_;
  const Own<T> own_;
  const OwnPixels<T> x_, grad_, dx_;
  const OwnNorm<T> norm_;
  float sum_[size] = {}, sum_centered_[size] = {};
};

template <class T, int Dims>
__global__ void __launch_bounds__(kThreads, 2)
    norm_relu_pool_backward_kernel(NormReluPoolBackward f, Images images, int lanes, bool whole, float* partials) {
  __shared__ typename PoolBackward<T, Dims>::Shared shared;
  PoolBackward<T, Dims>(f, images, lanes, whole, shared).run(partials);
}

// body(Kind<T>, Dimensions).
template <class T>
struct Type {
  using type = T;
};

template <class Body>
int with_kernel(Arithmetic arithmetic, bool pools, const Shape& s, Body body) {
  const auto with_type = [&](auto dims) {
    switch (arithmetic) {
      case Arithmetic::bf16:
        return body(Type<__nv_bfloat16>{}, dims);
      case Arithmetic::f16:
        return body(Type<__half>{}, dims);
      default:
        return body(Type<float>{}, dims);
    }
  };
  if (!pools) return with_type(Constant<0>{});
  return s.d > 1 ? with_type(Constant<3>{}) : s.h > 1 ? with_type(Constant<2>{}) : with_type(Constant<1>{});
}

template <int Dims>
Images images_of(const Shape& s) {
  const auto box = [](int64_t n, int64_t d, int64_t h, int64_t w) { return Box{int(n), int(d), int(h), int(w)}; };
  Images images;
  images.pixels = Dims == 0 ? box(1, 1, 1, s.pixels()) : box(s.n, s.d, s.h, s.w);
  images.windows = Dims == 0 ? images.pixels : box(s.n, (s.d + 1) / 2, (s.h + 1) / 2, (s.w + 1) / 2);
  images.boxes = boxes_in(images.windows, Windows<Dims>::box());
  return images;
}

// Whether pixels can be numbered, and the bytes from one to the next counted, by 32 bits.
bool counts(const Shape& s, std::initializer_list<Pixels> images) {
  return s.pixels() <= INT32_MAX && std::all_of(images.begin(), images.end(), [](const Pixels& image) {
           return image.ld * int64_t{sizeof(float)} <= INT32_MAX;
         });
}

// Threads that share a pixel, and blocks beside each other for all of its channels.
struct Channels {
  int lanes;
  unsigned blocks;

  template <class T>
  static Channels of(const Shape& s) {
    const int64_t chunks = (s.in + Chunk<T>::size - 1) / Chunk<T>::size;
    int lanes = 1;
    while (lanes < chunks && lanes < kMostLanes) lanes *= 2;
    return {lanes, static_cast<unsigned>((chunks + lanes - 1) / lanes)};
  }
};

int backward_blocks(const NormReluPoolBackward& f, Arithmetic arithmetic, const Device& device) {
  int boxes = 0;
  with_kernel(arithmetic, f.pools, f.shape, [&](auto, auto dims) {
    boxes = images_of<decltype(dims)::value>(f.shape).boxes.volume();
    return 0;
  });
  return std::min(boxes, kBlocks * device.multiprocessors);
}

}  // namespace

size_t norm_relu_pool_workspace(const NormReluPool&, Arithmetic, const Device&) { return 0; }

int norm_relu_pool(const NormReluPool& f, Arithmetic arithmetic, const Device&, void*, void* stream) {
  if (f.shape.pixels() == 0) return cudaSuccess;
  if (!counts(f.shape, {f.x, f.out})) return cudaErrorNotSupported;
  return with_kernel(arithmetic, f.pools, f.shape, [&](auto type, auto dims) {
    using T = typename decltype(type)::type;
    constexpr int Dims = decltype(dims)::value;
    const Images images = images_of<Dims>(f.shape);
    const Channels channels = Channels::of<T>(f.shape);
    return LAUNCH(norm_relu_pool_kernel<T, Dims>, dim3(static_cast<unsigned>(images.boxes.volume()), channels.blocks),
                  dim3(kThreads), 0, stream, f, images, channels.lanes, in_whole_chunks<T>(f.x.data, f.x.ld),
                  in_whole_chunks<T>(f.out.data, f.out.ld));
  });
}

size_t norm_relu_pool_backward_workspace(const NormReluPoolBackward& f, Arithmetic arithmetic, const Device& device) {
  const int64_t values = int64_t{2} * backward_blocks(f, arithmetic, device) * f.shape.in;
  return (static_cast<size_t>(values) * sizeof(float) + 255) / 256 * 256;
}

int norm_relu_pool_backward(const NormReluPoolBackward& f, Arithmetic arithmetic, const Device& device, void* workspace,
                            void* stream) {
  if (f.shape.pixels() == 0) return cudaSuccess;
  if (!counts(f.shape, {f.grad, f.x, f.dx})) return cudaErrorNotSupported;
  const int blocks = backward_blocks(f, arithmetic, device);
  float* const partials = static_cast<float*>(workspace);
  const int error = with_kernel(arithmetic, f.pools, f.shape, [&](auto type, auto dims) {
    using T = typename decltype(type)::type;
    constexpr int Dims = decltype(dims)::value;
    const Channels channels = Channels::of<T>(f.shape);
    const bool whole = in_whole_chunks<T>(f.x.data, f.x.ld) && in_whole_chunks<T>(f.grad.data, f.grad.ld) &&
                       in_whole_chunks<T>(f.dx.data, f.dx.ld);
    return LAUNCH(norm_relu_pool_backward_kernel<T, Dims>, dim3(static_cast<unsigned>(blocks), channels.blocks),
                  dim3(kThreads), 0, stream, f, images_of<Dims>(f.shape), channels.lanes, whole, partials);
  });
  if (error != cudaSuccess) return error;
  Backward sums{};
  sums.shape = f.shape;
  sums.norm = f.norm;
  sums.owed = f.owed;
  return add_partials(sums, arithmetic, {}, {partials, blocks, 2 * f.shape.in}, {}, stream);
}

}  // namespace fused_densenet
