// What data is stored as, what is computed in: float for each storage type, and back, rounded to nearest; one number,
// two, or 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

__device__ __forceinline__ float2 load2(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 load2(const __nv_bfloat16* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}
__device__ __forceinline__ float2 load2(const __half* from) {
  return __half22float2(*reinterpret_cast<const __half2*>(from));
}
__device__ __forceinline__ void store2(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
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
