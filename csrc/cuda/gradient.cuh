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

// The gradient's chunks of a thread's own channels: the first `left` from `channel` on; what lies beyond is zero.
template <class T>
class OwnGradient {
  static constexpr int size = Chunk<T>::size;

 public:
  __device__ OwnGradient(const Gradient& grad, float slope, int64_t channel, int64_t left, bool whole)
      : grad_(grad), activation_(slope), channel_(channel), left_(left), whole_(whole) {
    if (grad.mean == nullptr) return;
    const auto entry = [&](const void* vector, int i) {
      return i < left ? static_cast<const float*>(vector)[channel + i] : 0.0f;
    };
#pragma unroll
    for (int i = 0; i < size; ++i) {
      mean_[i] = entry(grad.mean, i);
      constant_[i] = entry(grad.constant, i);
      slope_[i] = entry(grad.slope, i);
    }
  }

  __device__ __forceinline__ void load(float (&to)[size], int64_t pixel) const {
    as_floats(to, chunk(grad_.stored, pixel));
    if (grad_.mean == nullptr && activation_ == 1) return;
    float value[size];
    as_floats(value, chunk(grad_.value, pixel));
#pragma unroll
    for (int i = 0; i < size; ++i) {
      to[i] = grad_.mean == nullptr ? leaky_backward(to[i], value[i], activation_)
                                    : load_gradient(to[i], value[i], mean_[i], constant_[i], slope_[i]);
    }
  }

 private:
  __device__ Chunk<T> chunk(const Pixels& from, int64_t pixel) const {
    return load_numbers(static_cast<const T*>(from.data) + pixel * from.ld + channel_, 1, left_, whole_);
  }

  const Gradient& grad_;
  const float activation_;
  const int64_t channel_, left_;
  const bool whole_;
  float mean_[size] = {}, constant_[size] = {}, slope_[size] = {};
};

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
