// Operands on their way from global to shared memory: asynchronous copies by stages, then normalisation in place.
//
// The thread that copied a chunk of 16 bytes also normalises it, between the copy's arrival and the barrier that shows
// the stage to the block: each element is normalised and rectified once, whatever the tiles that are multiplied from
// it, and no arithmetic stands between ldmatrix and the tensor cores. For 128 pixels by 16 channels that is 8 KiB
// through shared memory beside the 16 KiB of fragments; on the way to fragments it would be done once per warp that
// shares the pixels, and sixteen times for fused multiply-adds.
#pragma once

#include "numbers.cuh"
#include "product.cuh"
#include "ptx.cuh"

namespace fused_densenet {

constexpr int kChunk = 16;          // bytes that are copied and normalised together
constexpr int kStage = 4 * kChunk;  // bytes of a row in one stage
constexpr int kPitch = 5 * kChunk;  // from one row of a stage to the next
constexpr int kMostStages = 4;

// The row of shared memory that is taken at this turn, where a row is shared by `lanes` lanes of 16 bytes each. A
// quarter of a warp is served at a time: one row, or 8 / lanes of them, which lie in different banks if they are Block
// * lanes / 8 apart: Block is 8 where rows are an odd number of chunks apart, 4 where twice an odd number.
template <int Block>
__device__ __forceinline__ int row_of_turn(int turn, int lanes) {
  const int shift = lanes == 4 ? 1 : lanes == 2 || (lanes == 1 && Block == 4) ? 2 : lanes == 1 ? 3 : 0;
  const int in_block = turn % Block, together = in_block & ((1 << shift) - 1);
  return turn - in_block + together * (Block >> shift) + (in_block >> shift);
}

// Which row a thread copies and normalises in each pass of a block; four lanes take a row.
__device__ __forceinline__ int own_row_of(int thread) { return row_of_turn<8>(thread / 4, 4); }

// The widest copy that the alignment of rows allows, in bytes; 2 is no asynchronous copy.
inline int access_of(const void* data, int64_t row_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row_bytes);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

__device__ __forceinline__ int clamp(int64_t x, int low, int high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

// Copies the first `valid` of a chunk's 16 bytes and fills the rest with zeros, by copies of Access bytes.
template <int Access>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const unsigned char* from, int valid) {
  if constexpr (Access == 2) {
    Chunk<uint16_t> chunk;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      chunk.element[i] = 2 * i < valid ? __ldg(reinterpret_cast<const uint16_t*>(from) + i) : uint16_t{0};
    }
    *reinterpret_cast<Chunk<uint16_t>*>(to) = chunk;
  } else if constexpr (Access == 16) {
    cp_async_partial<16>(to, from, valid);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; i += Access) {
      cp_async_partial<Access>(to + i, from + i, clamp(valid - i, 0, Access));
    }
  }
}

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// body(Constant<access>{}): one loop of copies for each width, instead of a choice for each copy.
template <class Body>
__device__ __forceinline__ void with_access(int access, Body body) {
  if (access == 16) {
    body(Constant<16>{});
  } else if (access == 8) {
    body(Constant<8>{});
  } else if (access == 4) {
    body(Constant<4>{});
  } else {
    body(Constant<2>{});
  }
}

__device__ __forceinline__ void copy_chunk(unsigned char* to, const unsigned char* from, int valid, int access) {
  with_access(access, [&](auto width) { copy_chunk<decltype(width)::value>(to, from, valid); });
}

// Copies `count` chunks of rows some bytes apart on both sides, each `step` rows beyond the last; `left` rows exist
// from the first on.
__device__ __forceinline__ void copy_rows(unsigned char* to, int to_step, const unsigned char* from, int64_t from_step,
                                          int count, int left, int step, int valid, int access) {
  with_access(access, [&](auto width) {
    [[maybe_unused]] constexpr int together = decltype(width)::value < 16 ? 1 : 4;
#pragma unroll together
    for (int i = 0; i < count; ++i) {
      copy_chunk<decltype(width)::value>(to, from, left > 0 ? valid : 0);
      left -= step;
      to += to_step;
      from += from_step;
    }
  });
}

// The ReLU's input, by one expression in forward and backward: the masks agree.
__device__ __forceinline__ float normalised(float x, float mean, float scale, float shift) {
  return fmaf(x - mean, scale, shift);
}

// The activation, with `slope` for negative inputs: of 1 the identity, of 0 ReLU, which sends -inf to 0. NaN stays NaN.
__device__ __forceinline__ float leaky(float x, float slope) { return x < 0 ? (slope == 0 ? 0.0f : slope * x) : x; }
// Its backward, by the sign of its input or of its output.
__device__ __forceinline__ float leaky_backward(float gradient, float of, float slope) {
  return slope == 0 ? (of <= 0 ? 0.0f : gradient) : of > 0 ? gradient : slope * gradient;
}

// The same for loops, one for each kind of slope: ReLU, that of nearly all networks, costs what it costs alone.
struct Relu {
  __device__ __forceinline__ float operator()(float z) const { return z < 0 ? 0.0f : z; }
  static __device__ __forceinline__ float backward(float gradient, float z) { return z <= 0 ? 0.0f : gradient; }
};
struct Leaky {
  float slope;
  __device__ __forceinline__ float operator()(float z) const { return z < 0 ? slope * z : z; }
  __device__ __forceinline__ float backward(float gradient, float z) const {
    return z > 0 ? gradient : slope * gradient;
  }
};

// body(the activation).
template <class Body>
__device__ __forceinline__ void with_activation(float slope, Body body) {
  if (slope == 0) {
    body(Relu{});
  } else {
    body(Leaky{slope});
  }
}

// Without a norm x is multiplied as it is.
inline float slope_of(const Norm& norm) {
  return norm.mean == nullptr ? 1.0f : static_cast<float>(norm.negative_slope);
}

// An entry of a vector in float32 or, where it is narrow, in the data's type.
template <class T>
__device__ __forceinline__ float entry(const void* vector, bool narrow, int64_t i) {
  return narrow ? as_float(static_cast<const T*>(vector)[i]) : static_cast<const float*>(vector)[i];
}

// Vectors of channels in shared memory, `channels` (a multiple of eight) of each. Lanes that read eight channels each,
// four at a time, find them in different banks: in every other 32 channels neighbouring fours are exchanged.
struct Vectors {
  float* data;
  int channels;

  __device__ float* at(int vector, int channel) const {
    return data + vector * channels + (channel ^ (channel >> 5 & 1) << 2);
  }
  template <int N>
  __device__ void read(float (&to)[N], int vector, int channel) const {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(at(vector, channel + i));
      to[i] = v.x;
      to[i + 1] = v.y;
      to[i + 2] = v.z;
      to[i + 3] = v.w;
    }
  }
};

// A norm as one affine map of a channel: (x - mean) * scale + shift, for data of type T.
template <class T>
struct ChannelNorm {
  float mean = 0, scale = 0, shift = 0;

  __device__ ChannelNorm() {}
  __device__ ChannelNorm(const Norm& norm, int64_t channel)
      : mean(static_cast<const float*>(norm.mean)[channel]),
        scale(entry<T>(norm.weight, norm.narrow, channel) * rstd(norm, channel)),
        shift(entry<T>(norm.bias, norm.narrow, channel)) {}

  // The identity where there is no norm.
  static __device__ ChannelNorm of(const Norm& norm, int64_t channel) {
    if (norm.mean != nullptr) return ChannelNorm(norm, channel);
    ChannelNorm identity;
    identity.scale = 1;
    return identity;
  }
  static __device__ float rstd(const Norm& norm, int64_t channel) {
    return 1.0f / sqrtf(static_cast<const float*>(norm.var)[channel] + static_cast<float>(norm.eps));
  }
};

// A norm's affine map of a block's channels, zero beyond the last: what lies there becomes zero, because copies leave
// zeros.
struct NormVectors : Vectors {
  static constexpr int kCount = 3;
  template <class T>
  __device__ void load(const Norm& norm, int64_t first, int count) const {
    for (int i = threadIdx.x; i < channels; i += blockDim.x) {
      const ChannelNorm<T> own = i < count ? ChannelNorm<T>::of(norm, first + i) : ChannelNorm<T>();
      *at(0, i) = own.mean;
      *at(1, i) = own.scale;
      *at(2, i) = own.shift;
    }
  }
};

// A chunk as it is multiplied.
template <Arithmetic A>
__device__ __forceinline__ uint4 multiplied(const float (&x)[Chunk<typename Product<A>::T>::size]) {
  using T = typename Product<A>::T;
  if constexpr (sizeof(T) == 2) {
    return make_uint4(packed<T>(x[0], x[1]), packed<T>(x[2], x[3]), packed<T>(x[4], x[5]), packed<T>(x[6], x[7]));
  } else {
    const auto bits = [](float y) { return __float_as_uint(Product<A>::number(y)); };
    return make_uint4(bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));
  }
}

// The affine map of one chunk's channels, in registers.
template <Arithmetic A>
struct Affine {
  using T = typename Product<A>::T;
  static constexpr int size = Chunk<T>::size;
  float mean[size], scale[size], shift[size];

  __device__ Affine(const Vectors& vectors, int channel) {
    vectors.read(mean, 0, channel);
    vectors.read(scale, 1, channel);
    vectors.read(shift, 2, channel);
  }
  // What is multiplied.
  template <class Activation>
  __device__ uint4 activated(const void* place, Activation activation) const {
    float z[size];
    as_floats(z, *static_cast<const Chunk<T>*>(place));
#pragma unroll
    for (int i = 0; i < size; ++i) z[i] = normalised(z[i], mean[i], scale[i], shift[i]);
    return rounded_activations(z, activation);
  }

 private:
  static __device__ uint4 rounded_activations(float (&z)[size], Leaky leaky) {
#pragma unroll
    for (int i = 0; i < size; ++i) z[i] = leaky(z[i]);
    return multiplied<A>(z);
  }
  static __device__ uint4 rounded_activations(const float (&z)[size], Relu relu) {
    if constexpr (sizeof(T) == 2) {
      using P = Product<A>;
      return make_uint4(P::rectified(z[0], z[1]), P::rectified(z[2], z[3]), P::rectified(z[4], z[5]),
                        P::rectified(z[6], z[7]));
    } else {
      const auto bits = [&](float x) { return __float_as_uint(Product<A>::number(relu(x))); };
      return make_uint4(bits(z[0]), bits(z[1]), bits(z[2]), bits(z[3]));
    }
  }
};

// Whether what was copied is what is multiplied; TF32 still has to be rounded.
template <Arithmetic A>
__device__ __forceinline__ bool multiplied_as_it_is(const Norm& norm) {
  return A != Arithmetic::tf32 && norm.mean == nullptr;
}

__device__ __forceinline__ void wait_for_all_but(int groups) {
  if (groups >= 2) {
    cp_async_wait<2>();
  } else if (groups == 1) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

// Runs `steps` steps over a ring of 2 to kMostStages stages: load(stage) begins the copies of the next step that was
// not loaded, prepare(stage) may change what its thread has copied, consume(stage) reads what the block has prepared.
// Loads run stages - 1 steps ahead. Every load is followed by a barrier before the next one.
template <class Load, class Prepare, class Consume>
__device__ __forceinline__ void pipeline(int64_t steps, int stages, Load load, Prepare prepare, Consume consume) {
  int current = 0, filling = 0;
  for (int64_t i = 1 - stages; i < steps; ++i) {
    if (i + stages - 1 < steps) load(filling);
    cp_async_commit();
    if (i >= 0) {
      consume(current);
      current = current == stages - 1 ? 0 : current + 1;
    }
    wait_for_all_but(stages - 2);
    if (i >= -1 && i + 1 < steps) prepare(current);
    __syncthreads();
    filling = filling == stages - 1 ? 0 : filling + 1;
  }
}

}  // namespace fused_densenet
