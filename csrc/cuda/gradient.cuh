// The gradient on its way into a product, and chunks of numbers on their way in and out.
#pragma once

#include "operand.cuh"

namespace fused_densenet {

// A gradient as it is loaded (contract.Gradient), where something is owed.
__device__ __forceinline__ float load_gradient(float stored, float value, float mean, float constant, float slope) {
  return stored + fmaf(slope, value - mean, constant);
}

// The slope of the activation that a gradient is of the result of; 1 where there is none.
inline float gradient_slope_of(const Gradient& grad) { return static_cast<float>(grad.negative_slope); }

// The gradient's first `left` channels of a chunk, from `channel` on; what lies beyond is zero.
template <class T>
__device__ __forceinline__ void load_gradient(float (&to)[Chunk<T>::size], const Gradient& grad, float slope,
                                              int64_t pixel, int64_t channel, int64_t left, bool whole) {
  const auto load = [&](const Pixels& from) {
    return load_numbers(static_cast<const T*>(from.data) + pixel * from.ld + channel, 1, left, whole);
  };
  as_floats(to, load(grad.stored));
  if (grad.mean == nullptr && slope == 1) return;
  float value[Chunk<T>::size];
  as_floats(value, load(grad.value));
  const auto vector = [channel](const void* data) { return static_cast<const float*>(data) + channel; };
#pragma unroll
  for (int i = 0; i < Chunk<T>::size; ++i) {
    if (grad.mean == nullptr) {
      to[i] = leaky_backward(to[i], value[i], slope);
    } else if (i < left) {
      to[i] = load_gradient(to[i], value[i], vector(grad.mean)[i], vector(grad.constant)[i], vector(grad.slope)[i]);
    }
  }
}

// The first `count` numbers of a chunk in shared memory to global memory.
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const T* from, int count, int access) {
  const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(from);
  const unsigned* words = reinterpret_cast<const unsigned*>(&chunk);
  if (count < Chunk<T>::size || access < 4) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::size; ++i) {
      if (i < count) to[i] = chunk.element[i];
    }
  } else if (access == 16) {
    *reinterpret_cast<Chunk<T>*>(to) = chunk;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      if (access == 8) {
        reinterpret_cast<uint2*>(to)[i / 2] = make_uint2(words[i], words[i + 1]);
      } else {
        reinterpret_cast<unsigned*>(to)[i] = words[i], reinterpret_cast<unsigned*>(to)[i + 1] = words[i + 1];
      }
    }
  }
}

}  // namespace fused_densenet
