// Sums that other kernels left: a block of 256 threads adds 64 neighbouring ones, four threads take every fourth slice
// each, and their four sums are added in order. Slices are read in whole 256-byte rows.
//
// And the bias's gradient, a sum of the gradient alone, which has a kernel of its own: the backward kernels have no
// register left for it, and the gradient is a small part of what they read.
#include <algorithm>

#include "gradient.cuh"
#include "numbers.cuh"
#include "operand.cuh"
#include "partials.cuh"
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kColumns = 64, kLanes = 4, kThreads = kColumns * kLanes;
constexpr int kMostLanes = 32, kFewestPixels = 64, kBlocks = 2;  // blocks on a multiprocessor, pixels of each

template <class T>
__device__ void store_weight(const Backward& f, int64_t i, float sum) {
  const Weight& w = f.dweight;
  const int64_t c = i % f.shape.in, k = i / f.shape.in % f.shape.out, tap = i / (f.shape.in * f.shape.out);
  const int64_t kw = f.shape.kw, kh = f.shape.kh;
  const int64_t to = k * w.stride_out + c * w.stride_in + tap / (kh * kw) * w.stride_tap[0] +
                     tap / kw % kh * w.stride_tap[1] + tap % kw * w.stride_tap[2];
  if (w.is_float) {
    static_cast<float*>(w.data)[to] = sum;
  } else {
    static_cast<T*>(w.data)[to] = rounded<T>(sum);
  }
}

template <class T>
__device__ void store_entry(void* vector, bool narrow, int64_t i, float value) {
  if (narrow) {
    static_cast<T*>(vector)[i] = rounded<T>(value);
  } else {
    static_cast<float*>(vector)[i] = value;
  }
}

// What a sum of a channel, of dz or, where `centered`, of dz (x - mean), is to the norm.
template <class T>
__device__ void settle(const Backward& f, int64_t channel, bool centered, float sum) {
  const Owed& owed = f.owed;
  const float rstd = ChannelNorm<T>::rstd(f.norm, channel), scaled = centered ? sum * rstd : sum;
  store_entry<T>(centered ? owed.dweight : owed.dbias, f.norm.narrow, channel, scaled);
  if (owed.constant == nullptr) return;
  const Shape& s = f.shape;
  const float pixels =
      owed.pixels == nullptr ? static_cast<float>(s.n * s.d * s.h * s.w) : *static_cast<const float*>(owed.pixels);
  const float share = ChannelNorm<T>(f.norm, channel).scale / pixels * (centered ? rstd : 1.0f);
  float* const to = static_cast<float*>(centered ? owed.slope : owed.constant) + channel;
  *to = (f.accumulate ? *to : 0.0f) - share * scaled;
}

__host__ __device__ int64_t blocks_of(const Partials& partials) { return (partials.values + kColumns - 1) / kColumns; }

template <class T>
__global__ void __launch_bounds__(kThreads) add_kernel(Backward f, Partials weights, Partials sums, Partials biases) {
  __shared__ float shares[kLanes][kColumns];
  const int64_t first_of_sums = blocks_of(weights), first_of_biases = first_of_sums + blocks_of(sums);
  const bool is_weight = blockIdx.x < first_of_sums, is_bias = blockIdx.x >= first_of_biases;
  const auto own = [&](auto field) { return is_weight ? weights.*field : is_bias ? biases.*field : sums.*field; };
  const float* const from = own(&Partials::data);
  const int splits = own(&Partials::splits);
  const int64_t values = own(&Partials::values);
  const int64_t first = is_weight ? 0 : is_bias ? first_of_biases : first_of_sums;
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int64_t i = (blockIdx.x - first) * kColumns + column;
  float share = 0;
  if (i < values) {
#pragma unroll 8
    for (int split = lane; split < splits; split += kLanes) share += from[split * values + i];
  }
  shares[lane][column] = share;
  __syncthreads();
  if (lane != 0 || i >= values) return;
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kLanes; ++j) sum += shares[j][column];
  if (is_weight) {
    store_weight<T>(f, i, sum);
  } else if (is_bias) {
    store_entry<T>(f.dbias.data, f.dbias.narrow, i, sum);
  } else {
    settle<T>(f, i % f.shape.in, i >= f.shape.in, sum);
  }
}

// Threads beside each other take chunks of a pixel's channels, `lanes` of them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Gradient grad, float slope, int64_t channels, int64_t pixels, int lanes, bool whole, float* partials) {
  constexpr int size = Chunk<T>::size;
  __shared__ float shares[size][kThreads];
  const int lane = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const int64_t first_channel = int64_t{blockIdx.y} * lanes * size, channel = first_channel + lane * size;
  const int64_t step = int64_t{gridDim.x} * (kThreads / lanes);
  const OwnGradient<T> gradient(grad, slope, channel, channels - channel, whole);
  float sum[size] = {};
  for (int64_t p = int64_t{blockIdx.x} * (kThreads / lanes) + row; p < pixels && channel < channels; p += step) {
    float g[size];
    gradient.load(g, p);
#pragma unroll
    for (int i = 0; i < size; ++i) sum[i] += g[i];
  }
#pragma unroll
  for (int i = 0; i < size; ++i) shares[i][threadIdx.x] = sum[i];
  __syncthreads();
  for (int c = threadIdx.x; c < lanes * size && first_channel + c < channels; c += kThreads) {
    float total = 0;
    for (int i = c / size; i < kThreads; i += lanes) total += shares[c % size][i];
    partials[blockIdx.x * channels + first_channel + c] = total;
  }
}

template <class T>
int launch_sum(const Backward& f, const Partials& biases, void* stream) {
  const int64_t chunks = (f.shape.out + Chunk<T>::size - 1) / Chunk<T>::size;
  int lanes = 1;
  while (lanes < chunks && lanes < kMostLanes) lanes *= 2;
  const auto whole = [](const Pixels& p) { return in_whole_chunks<T>(p.data, p.ld); };
  const dim3 grid(static_cast<unsigned>(biases.splits), static_cast<unsigned>((chunks + lanes - 1) / lanes));
  return LAUNCH(sum_kernel<T>, grid, dim3(kThreads), 0, stream, f.grad, gradient_slope_of(f.grad), f.shape.out,
                f.shape.out_pixels(), lanes, whole(f.grad.stored) && whole(f.grad.value), biases.data);
}

}  // namespace

int bias_splits(const Backward& f, const Device& device) {
  if (f.dbias.data == nullptr) return 0;
  const int64_t most = (f.shape.out_pixels() + kFewestPixels - 1) / kFewestPixels;
  return static_cast<int>(std::min<int64_t>(most, kBlocks * device.multiprocessors));
}

int sum_gradient(const Backward& f, Arithmetic arithmetic, const Partials& biases, void* stream) {
  const auto sum = arithmetic == Arithmetic::bf16  ? launch_sum<__nv_bfloat16>
                   : arithmetic == Arithmetic::f16 ? launch_sum<__half>
                                                   : launch_sum<float>;
  return sum(f, biases, stream);
}

int add_partials(const Backward& f, Arithmetic arithmetic, const Partials& weights, const Partials& sums,
                 const Partials& biases, void* stream) {
  const int64_t blocks = blocks_of(weights) + blocks_of(sums) + blocks_of(biases);
  if (blocks == 0) return cudaSuccess;
  const auto kernel = arithmetic == Arithmetic::bf16  ? add_kernel<__nv_bfloat16>
                      : arithmetic == Arithmetic::f16 ? add_kernel<__half>
                                                      : add_kernel<float>;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, f, weights, sums,
                       biases);
}

}  // namespace fused_densenet
