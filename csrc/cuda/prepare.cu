#include <algorithm>

#include "prepare.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 256, kCalls = 32;  // as many as the parameters of a launch have room for, 4 KiB

struct Preparations {
  Preparation of[kCalls];
};
static_assert(sizeof(Preparations) <= 4000);

// A weight's place [out][in][tap] of a packed number; outside of it where there is none.
struct Place3 {
  int64_t out, in, tap;
};

__device__ Place3 place_in_rows(const Packing& p, int64_t i) { return {i / p.row, i % p.row, 0}; }

template <Arithmetic A>
__device__ Place3 place_in_fragments(const Packing& p, int64_t i) {
  using M = Product<A>;
  constexpr int each = M::kFragments / int{sizeof(typename M::T)}, channels = M::kBytes / int{sizeof(typename M::T)};
  int64_t at = i / each;
  const int2 place = M::packed_place(static_cast<int>(i % each));
  const int64_t taps = p.kernel[0] * p.kernel[1] * p.kernel[2], group = at % p.groups, tap = (at /= p.groups) % taps;
  const int64_t steps = (p.in + channels - 1) / channels, step = (at /= taps) % steps, block = at / steps;
  return {(block * p.groups + group) * kGroup + place.x, step * channels + place.y, tap};
}

template <Arithmetic A>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ Preparations all) {
  using T = typename Product<A>::T;
  const Preparation& own = all.of[blockIdx.y];
  const Packing& p = own.packing;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < own.counters) {
    reinterpret_cast<unsigned*>(static_cast<unsigned char*>(own.at) + own.counters_at)[i] = 0;
  }
  if (i >= p.numbers) return;
  const Place3 at = p.groups == 0 ? place_in_rows(p, i) : place_in_fragments<A>(p, i);
  float value = 0;
  if (at.out < p.out && at.in < p.in) {
    const Weight& w = p.weight;
    const int64_t kh = p.kernel[1], kw = p.kernel[2];
    const int64_t offset = at.out * w.stride_out + at.in * w.stride_in + at.tap / (kh * kw) * w.stride_tap[0] +
                           at.tap / kw % kh * w.stride_tap[1] + at.tap % kw * w.stride_tap[2];
    value = w.is_float ? static_cast<const float*>(w.data)[offset] : as_float(static_cast<const T*>(w.data)[offset]);
  }
  static_cast<T*>(own.at)[i] = Product<A>::number(value);
}

Packing packing_of(const Forward& f) {
  const Shape& s = f.shape;
  const auto number = [](int64_t x) { return static_cast<int>(x); };
  Packing p{};
  p.weight = f.weight;
  p.out = number(s.out), p.in = number(s.in);
  p.kernel[0] = number(s.kd), p.kernel[1] = number(s.kh), p.kernel[2] = number(s.kw);
  return p;
}

}  // namespace

Packing pack_rows(const Forward& f, Arithmetic arithmetic) {
  return with_arithmetic(arithmetic, [&](auto kind) {
    constexpr int64_t element = sizeof(typename Product<decltype(kind)::value>::T);
    Packing p = packing_of(f);
    p.row = static_cast<int>(ceil_div(f.shape.in * element, kChunk) * kChunk / element);
    p.numbers = int64_t{p.row} * p.out;
    return p;
  });
}

Packing pack_fragments(const Forward& f, int groups, Arithmetic arithmetic) {
  return with_arithmetic(arithmetic, [&](auto kind) {
    using M = Product<decltype(kind)::value>;
    constexpr int64_t element = sizeof(typename M::T);
    Packing p = packing_of(f);
    p.groups = groups;
    const int64_t blocks = ceil_div(f.shape.out, groups * kGroup), steps = ceil_div(f.shape.in * element, M::kBytes);
    p.numbers = blocks * steps * f.shape.taps() * groups * M::kFragments / element;
    return p;
  });
}

size_t packed_bytes(const Packing& packing, Arithmetic arithmetic) {
  const bool narrow = arithmetic == Arithmetic::bf16 || arithmetic == Arithmetic::f16;
  return aligned(static_cast<size_t>(packing.numbers) * (narrow ? 2 : 4));
}

int prepare(const Preparation* calls, int64_t count, Arithmetic arithmetic, void* stream) {
  return with_arithmetic(arithmetic, [&](auto kind) -> int {
    for (int64_t first = 0; first < count; first += kCalls) {
      const int64_t together = std::min<int64_t>(kCalls, count - first);
      Preparations batch{};
      std::copy_n(calls + first, together, batch.of);
      int64_t most = 1;
      for (const Preparation& p : batch.of) most = std::max({most, p.packing.numbers, p.counters});
      const dim3 grid(static_cast<unsigned>(ceil_div(most, kThreads)), static_cast<unsigned>(together));
      const int error = LAUNCH(prepare_kernel<decltype(kind)::value>, grid, dim3(kThreads), 0, stream, batch);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace fused_densenet
