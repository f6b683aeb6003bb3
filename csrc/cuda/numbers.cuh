// What data is stored as, what is computed in: float for each storage type, and back, rounded to nearest; one number,
// two, or 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace fused_densenet {

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T rounded(float x);
template <>
__device__ __forceinline__ float rounded<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half rounded<__half>(float x) {
  return __float2half_rn(x);
}

// The bits of two numbers of 16.
template <class Pair>
__device__ __forceinline__ unsigned word_of(const Pair& pair) {
  static_assert(sizeof(Pair) == sizeof(unsigned));
#ifdef CUDA_HOST
  unsigned word;
  __builtin_memcpy(&word, &pair, sizeof word);
  return word;
#else
  return reinterpret_cast<const unsigned&>(pair);  // device code would copy memory byte by byte
#endif
}

// Two numbers of 16 bits in a word, the first in its lower half.
template <class T>
__device__ __forceinline__ float2 unpacked(unsigned pair);
template <>
__device__ __forceinline__ float2 unpacked<__nv_bfloat16>(unsigned pair) {
#ifdef CUDA_HOST
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
#else
  float2 both;  // without a move from a register of bits to one of numbers
  asm("shl.b32 %0, %1, 16;" : "=f"(both.x) : "r"(pair));
  asm("and.b32 %0, %1, 0xFFFF0000;" : "=f"(both.y) : "r"(pair));
  return both;
#endif
}
template <>
__device__ __forceinline__ float2 unpacked<__half>(unsigned pair) {
  const auto half = [](unsigned bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); };
  return make_float2(half(pair), half(pair >> 16));
}
template <class T>
__device__ __forceinline__ unsigned packed(float a, float b);
template <>
__device__ __forceinline__ unsigned packed<__nv_bfloat16>(float a, float b) {
  return word_of(__floats2bfloat162_rn(a, b));
}
template <>
__device__ __forceinline__ unsigned packed<__half>(float a, float b) {
  return word_of(__floats2half2_rn(a, b));
}

__device__ __forceinline__ float2 load2(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 load2(const __nv_bfloat16* from) {
  return unpacked<__nv_bfloat16>(word_of(*reinterpret_cast<const __nv_bfloat162*>(from)));
}
__device__ __forceinline__ float2 load2(const __half* from) {
  return __half22float2(*reinterpret_cast<const __half2*>(from));
}
// To shared memory; by one instruction: the compiler may make two of an assignment, and these conflict.
__device__ __forceinline__ void store2(float* to, float a, float b) {
#ifdef CUDA_HOST
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
#else
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(shared_address(to)), "f"(a), "f"(b) : "memory");
#endif
}
__device__ __forceinline__ void store2(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ void store2(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}

// 16 bytes of neighbouring elements, copied by one instruction where they are aligned.
template <class T>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(T);
  T element[size];
};

// All numbers of a chunk, of which these are the bits.
template <class T>
__device__ __forceinline__ void as_floats(float (&to)[Chunk<T>::size], const uint4& bits) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      const float2 pair = unpacked<T>(words[i]);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    } else {
      to[i] = __uint_as_float(words[i]);
    }
  }
}

template <class T>
__device__ __forceinline__ void as_floats(float (&to)[Chunk<T>::size], const Chunk<T>& from) {
  as_floats<T>(to, __builtin_bit_cast(uint4, from));
}

// The first `count` numbers of a chunk, some elements apart in memory; zeros after them. At once where it is whole: 16
// aligned bytes.
template <class T>
__device__ __forceinline__ Chunk<T> load_numbers(const T* from, int64_t stride, int64_t count, bool whole) {
  if (whole && count >= Chunk<T>::size) return *reinterpret_cast<const Chunk<T>*>(from);
  Chunk<T> values;
#pragma unroll
  for (int i = 0; i < Chunk<T>::size; ++i) values.element[i] = i < count ? from[i * stride] : rounded<T>(0.0f);
  return values;
}

template <class T>
__device__ __forceinline__ void store_numbers(T* to, int64_t stride, int64_t count, bool whole,
                                              const Chunk<T>& values) {
  if (whole && count >= Chunk<T>::size) {
    *reinterpret_cast<Chunk<T>*>(to) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < Chunk<T>::size; ++i) {
    if (i < count) to[i * stride] = values.element[i];
  }
}

// Whether all bytes of `strides` (in elements of T) keep 16-byte alignment, as `data` has it.
template <class T, class... Strides>
bool in_whole_chunks(const void* data, Strides... strides) {
  return ((reinterpret_cast<uintptr_t>(data) % 16 == 0) && ... && (strides * int64_t{sizeof(T)} % 16 == 0));
}

}  // namespace fused_densenet
