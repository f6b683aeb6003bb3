// Weights packed in the order in which warps multiply them, for kernels that read them from global memory.
#pragma once

#include "forward.cuh"

namespace fused_densenet {

constexpr int kFragmentThreads = 256;

// Fragments lie as [block of columns][M::kBytes of channels][tap][group of 16 columns], `groups` to a block; zero where
// there is no channel, rounded to what is multiplied.
template <Arithmetic A, class W>
__global__ void __launch_bounds__(kFragmentThreads)
    pack_fragments_kernel(Shape s, Weight weight, int groups, int64_t count, typename Product<A>::T* packed) {
  using M = Product<A>;
  constexpr int each = M::kFragments / int{sizeof(typename M::T)}, channels = M::kBytes / int{sizeof(typename M::T)};
  const int64_t i = int64_t{blockIdx.x} * kFragmentThreads + threadIdx.x;
  if (i >= count) return;
  int64_t at = i / each;
  const int2 place = M::packed_place(static_cast<int>(i % each));
  const int64_t group = at % groups, taps = s.kd * s.kh * s.kw, tap = (at /= groups) % taps;
  const int64_t steps = (s.in + channels - 1) / channels, step = (at /= taps) % steps, block = at / steps;
  const int64_t out = (block * groups + group) * kGroup + place.x, in = step * channels + place.y;
  float value = 0;
  if (out < s.out && in < s.in) {
    const int64_t offset = out * weight.stride_out + in * weight.stride_in +
                           tap / (s.kh * s.kw) * weight.stride_tap[0] + tap / s.kw % s.kh * weight.stride_tap[1] +
                           tap % s.kw * weight.stride_tap[2];
    value = as_float(static_cast<const W*>(weight.data)[offset]);
  }
  packed[i] = M::number(value);
}

template <Arithmetic A>
size_t fragments_bytes(const Shape& s, int64_t groups) {
  using M = Product<A>;
  const int64_t blocks = ceil_div(s.out, groups * kGroup), steps = ceil_div(s.in * sizeof(typename M::T), M::kBytes);
  return blocks * steps * s.taps() * groups * M::kFragments;
}

template <Arithmetic A>
int pack_fragments(const Forward& f, int groups, void* packed, void* stream) {
  using T = typename Product<A>::T;
  const int64_t count = static_cast<int64_t>(fragments_bytes<A>(f.shape, groups) / sizeof(T));
  return LAUNCH(f.weight.is_float ? pack_fragments_kernel<A, float> : pack_fragments_kernel<A, T>,
                dim3(static_cast<unsigned>(ceil_div(count, kFragmentThreads))), dim3(kFragmentThreads), 0, stream,
                f.shape, f.weight, groups, count, static_cast<T*>(packed));
}

}  // namespace fused_densenet
