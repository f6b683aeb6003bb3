#include <algorithm>

#include "prepare.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 256, kCalls = 32;  // as many as the parameters of a launch have room for, 4 KiB

struct Preparations {
  Preparation of[kCalls];
};
static_assert(sizeof(Preparations) <= 4000);

// Where the 16 bytes that a thread packs come from, by 32-bit divisions: a tap, and of each number the output and the
// input channel. Outside of the weight where there is none.
template <Arithmetic A>
struct Source {
  using M = Product<A>;
  static constexpr int size = Chunk<typename M::T>::size, each = M::kFragments / kChunk;

  bool in_rows;
  unsigned tap, out, in, in_fragment;

  __device__ Source(const Packing& p, unsigned chunk) : in_rows(p.groups == 0), tap(0), out(0), in(0), in_fragment(0) {
    if (in_rows) {
      const unsigned of_row = p.row / size;
      out = chunk / of_row;
      in = chunk % of_row * size;
      return;
    }
    constexpr unsigned channels = M::kBytes / sizeof(typename M::T);
    const unsigned taps = p.kernel[0] * p.kernel[1] * p.kernel[2], groups = p.groups;
    const unsigned steps = (p.in + channels - 1) / channels, group = chunk / each % groups;
    unsigned at = chunk / each / groups;
    in_fragment = chunk % each * size;
    tap = at % taps;
    at /= taps;
    out = (at / steps * groups + group) * kGroup;
    in = at % steps * channels;
  }

  // {output, input channel}
  __device__ int2 of(int number) const {
    int2 at = in_rows ? make_int2(0, number) : M::packed_place(static_cast<int>(in_fragment) + number);
    at.x += static_cast<int>(out);
    at.y += static_cast<int>(in);
    return at;
  }
};

template <Arithmetic A>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ Preparations all) {
  using T = typename Product<A>::T;
  const Preparation& own = all.of[blockIdx.y];
  const Packing& p = own.packing;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i < own.counters) {
    reinterpret_cast<unsigned*>(static_cast<unsigned char*>(own.at) + own.counters_at)[i] = 0;
  }
  if (int64_t{i} * Chunk<T>::size >= p.numbers) return;
  const Source<A> source(p, i);
  const Weight& w = p.weight;
  const unsigned kh = p.kernel[1], kw = p.kernel[2];
  const int64_t of_tap = source.tap / (kh * kw) * w.stride_tap[0] + source.tap / kw % kh * w.stride_tap[1] +
                         source.tap % kw * w.stride_tap[2];
  Chunk<T> packed;
#pragma unroll
  for (int j = 0; j < Chunk<T>::size; ++j) {
    const int2 at = source.of(j);
    float value = 0;
    if (at.x < p.out && at.y < p.in) {
      const int64_t offset = at.x * w.stride_out + at.y * w.stride_in + of_tap;
      value = w.is_float ? static_cast<const float*>(w.data)[offset] : as_float(static_cast<const T*>(w.data)[offset]);
    }
    packed.element[j] = Product<A>::number(value);
  }
  static_cast<Chunk<T>*>(own.at)[i] = packed;
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
    constexpr int size = Chunk<typename Product<decltype(kind)::value>::T>::size;
    for (int64_t first = 0; first < count; first += kCalls) {
      const int64_t together = std::min<int64_t>(kCalls, count - first);
      Preparations batch{};
      std::copy_n(calls + first, together, batch.of);
      int64_t most = 1;
      for (const Preparation& p : batch.of) most = std::max({most, p.packing.numbers / size, p.counters});
      const dim3 grid(static_cast<unsigned>(ceil_div(most, kThreads)), static_cast<unsigned>(together));
      const int error = LAUNCH(prepare_kernel<decltype(kind)::value>, grid, dim3(kThreads), 0, stream, batch);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace fused_densenet
