// A block of 256 threads adds 64 neighbouring sums: four threads take every fourth slice each, and their four sums are
// added in order. Slices are read in whole 256-byte rows.
#include "numbers.cuh"
#include "operand.cuh"
#include "partials.cuh"
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kColumns = 64, kLanes = 4;

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

// What a sum of a channel, of dz or, where `centered`, of dz (x - mean), is to the norm.
template <class T>
__device__ void settle(const Backward& f, int64_t channel, bool centered, float sum) {
  const Owed& owed = f.owed;
  const float rstd = ChannelNorm<T>::rstd(f.norm, channel), scaled = centered ? sum * rstd : sum;
  void* const gradient = centered ? owed.dweight : owed.dbias;
  if (f.norm.narrow) {
    static_cast<T*>(gradient)[channel] = rounded<T>(scaled);
  } else {
    static_cast<float*>(gradient)[channel] = scaled;
  }
  if (owed.constant == nullptr) return;
  const Shape& s = f.shape;
  const float pixels =
      owed.pixels == nullptr ? static_cast<float>(s.n * s.d * s.h * s.w) : *static_cast<const float*>(owed.pixels);
  const float share = ChannelNorm<T>(f.norm, channel).scale / pixels * (centered ? rstd : 1.0f);
  float* const to = static_cast<float*>(centered ? owed.slope : owed.constant) + channel;
  *to = (f.accumulate ? *to : 0.0f) - share * scaled;
}

template <class T>
__global__ void __launch_bounds__(kColumns* kLanes)
    add_kernel(Backward f, Partials weights, Partials sums, int64_t weight_values) {
  __shared__ float shares[kLanes][kColumns];
  const int64_t blocks_of_weights = (weight_values + kColumns - 1) / kColumns;
  const bool is_weight = blockIdx.x < blocks_of_weights;
  const float* const from = is_weight ? weights.data : sums.data;
  const int splits = is_weight ? weights.splits : sums.splits;
  const int64_t values = is_weight ? weight_values : 2 * f.shape.in;
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int64_t i = (blockIdx.x - (is_weight ? 0 : blocks_of_weights)) * kColumns + column;
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
  } else {
    settle<T>(f, i % f.shape.in, i >= f.shape.in, sum);
  }
}

}  // namespace

int add_partials(const Backward& f, Arithmetic arithmetic, const Partials& weights, const Partials& sums,
                 void* stream) {
  const int64_t values = f.dweight.data == nullptr ? 0 : f.shape.taps() * f.shape.out * f.shape.in;
  const int64_t blocks = (values + kColumns - 1) / kColumns + (2 * f.shape.in + kColumns - 1) / kColumns;
  const auto kernel = arithmetic == Arithmetic::bf16  ? add_kernel<__nv_bfloat16>
                      : arithmetic == Arithmetic::f16 ? add_kernel<__half>
                                                      : add_kernel<float>;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kColumns * kLanes), 0, stream, f, weights,
                       sums, values);
}

}  // namespace fused_densenet
