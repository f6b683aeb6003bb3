// What a .cu file needs to run on the CPU: CUDA's names, and the copies that a sanitizer must see.
//
// Every CUDA thread is a fiber, blocks run one after the other, barriers and warp collectives wait for their
// participants. The runner itself is compiled without sanitizers; kernels, and what stands in this header, with them.
// Checked always: barriers that not all threads reach, collectives that do not match, the address and alignment of
// ldmatrix and cp.async, limits of a launch. Shared memory holds NaN until it is written, and the target of cp.async
// until it is waited for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "engine.h"

namespace cuda_host {

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  const std::tuple<Parameters...> bound(arguments...);
  return std::apply(
      [&](const Parameters&... p) {
        const void* values[] = {&p..., nullptr};
        const size_t sizes[] = {sizeof(p)..., 0};
        const auto run = [](const void* function, const void* const* v) {
          [&]<size_t... i>(std::index_sequence<i...>) {
            reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(function))(
                *static_cast<const Parameters*>(v[i])...);
          }(std::index_sequence_for<Parameters...>{});
        };
        return launch(
            {reinterpret_cast<const void*>(kernel), grid, block, shared, int(sizeof...(p)), values, sizes, run});
      },
      bound);
}

template <int Count, bool Transposed>
void ldmatrix(uint32_t (&r)[Count], const void* p) {
  uint32_t row[4] = {};
  if (lane() < 8 * Count) {
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("ldmatrix: address %p is not aligned to 16 bytes", p);
    check_shared("ldmatrix: address", p, 16);
    for (int i = 0; i < 4; ++i) row[i] = static_cast<const uint32_t*>(p)[i];
  }
  load_matrices(p, row, r, Count, Transposed);
}

template <int Bytes>
void cp_async(void* to, const void* from, int valid) {
  if (valid < 0 || valid > Bytes) fail("cp.async: %d valid bytes of %d", valid, Bytes);
  if (reinterpret_cast<uintptr_t>(to) % Bytes || (valid && reinterpret_cast<uintptr_t>(from) % Bytes)) {
    fail("cp.async: %p <- %p is not aligned to %d bytes", to, from, Bytes);
  }
  check_shared("cp.async: target", to, Bytes);
  for (int i = 0; i < Bytes / 4; ++i) static_cast<uint32_t*>(to)[i] = ~0u;  // NaN until it is waited for
  copy_begins(to, from, Bytes, valid);
}

inline void copy_now(void* to, const void* from, int bytes, int valid) {
  if (valid == bytes) {
    if (bytes == 16) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
    if (bytes == 8) *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
    if (bytes == 4) *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
    return;
  }
  for (int i = 0; i < bytes; ++i) {
    static_cast<unsigned char*>(to)[i] = i < valid ? static_cast<const unsigned char*>(from)[i] : 0;
  }
}

inline void cp_async_wait(int keep) { copies_arrive(keep, copy_now); }

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & 0xFFFFE000u;
}

template <class T>
T shuffle_value(unsigned mask, T value, int from, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, from, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_host

// Static shared memory lies in one section, which is filled with NaN before each block.
#undef __shared__
#define __shared__ static __attribute__((section("cuda_shared")))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define threadIdx (::cuda_host::thread_index())
#define blockIdx (::cuda_host::block_index)
#define blockDim (::cuda_host::block_size)
#define gridDim (::cuda_host::grid_size)
#define warpSize 32

inline void __syncthreads(int line = __builtin_LINE()) { ::cuda_host::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { ::cuda_host::warp_barrier(mask, line); }
inline void __threadfence() { ::cuda_host::fence(); }
inline void __threadfence_block() { ::cuda_host::fence(); }

inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to = before + value;
  return before;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_host::lane();
  return ::cuda_host::shuffle_value(mask, value, (lane & -width) + (from & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_host::lane(), from = lane ^ other;
  return ::cuda_host::shuffle_value(mask, value, from < (lane & -width) + width ? from : lane, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_host::lane(), from = lane + by;
  return ::cuda_host::shuffle_value(mask, value, from < (lane & -width) + width ? from : lane, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::cuda_host::lane(), from = lane - by;
  return ::cuda_host::shuffle_value(mask, value, from >= (lane & -width) ? from : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return ::cuda_host::ballot(mask, value != 0, line);
}
inline int __any_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return ::cuda_host::ballot(mask, value != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return ::cuda_host::ballot(mask, value == 0, line) == 0;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t(a) * b) >> 32); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
