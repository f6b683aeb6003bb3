// The only inline PTX, and the launch. With CUDA_HOST defined the same names run on the CPU (tests only).
//
// Matrix fragments are those of the PTX ISA's mma.m16n8k16 and mma.m16n8k8: with g = lane / 4 and t = lane % 4, d[2 i +
// j] is row g + 8 i, column 2 t + j.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#ifdef CUDA_HOST
#include "cuda_host.h"
#define DYN_SMEM(name) unsigned char* name = ::cuda_host::dynamic_shared()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FD_BEFORE_SM80
#endif

namespace fused_densenet {

// LAUNCH(kernel, grid, block, shared, stream, arguments...) with `shared` bytes of dynamic shared memory; a
// cudaError_t.
#define LAUNCH(...) ::fused_densenet::launch_kernel(__VA_ARGS__)

constexpr size_t kSharedForAll = 48 << 10;  // dynamic shared memory that needs no leave

// Gives a kernel leave to all the dynamic shared memory that a block may have, once for each device. The leave is the
// kernel's and not a launch's: were it set to what each launch needs, one host thread could lower it between another's
// setting it and launching.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes of_kernel{};
  error = cudaFuncGetAttributes(&of_kernel, kernel);
  if (error != cudaSuccess) return error;
  most -= static_cast<int>(of_kernel.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream,
                  Arguments... arguments) {
  if (shared > kSharedForAll) {
    const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
#ifdef CUDA_HOST
  static_cast<void>(stream);
  return ::cuda_host::launch(kernel, grid, block, shared, arguments...);
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
#endif
}

// A place in shared memory, to which bytes can be added: 32 bits where pointers have 64.
#ifdef CUDA_HOST
using SharedAddress = const unsigned char*;
#else
using SharedAddress = unsigned;
#endif

__device__ __forceinline__ SharedAddress shared_address(const void* p) {
#ifdef CUDA_HOST
  return static_cast<SharedAddress>(p);
#else
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
#endif
}

// `count` times `step` bytes behind `from`, by one instruction: compilers multiply 64 bits by 64.
__device__ __forceinline__ const unsigned char* bytes_behind(const void* from, int count, int step) {
#ifdef CUDA_HOST
  return static_cast<const unsigned char*>(from) + int64_t{count} * step;
#else
  const unsigned char* to;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(count), "r"(step), "l"(from));
  return to;
#endif
}

// Four bytes of a word, each chosen by four bits of `which`, the lowest first.
__device__ __forceinline__ unsigned bytes_of(unsigned word, unsigned which) {
#ifdef CUDA_HOST
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= (word >> 8 * (which >> 4 * i & 3) & 0xFF) << 8 * i;
  return chosen;
#else
  return __byte_perm(word, 0, which);
#endif
}

#ifdef FD_BEFORE_SM80
// A product of bfloat16 term by term, which the tensor cores before sm_80 do not have. Not unrolled: there are hundreds
// of products in a kernel, and ptxas takes minutes over as many copies.
__device__ __forceinline__ void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t row[2], column[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row[i] = __shfl_sync(~0u, a[2 * half + i], 4 * g + q);
        column[i] = __shfl_sync(~0u, b[half], 4 * (2 * t + i) + q);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d[i] = fmaf(__uint_as_float(row[i >> 1] << 16), __uint_as_float(column[i & 1] << 16), d[i]);
        d[i] = fmaf(__uint_as_float(row[i >> 1] & ~0xFFFFu), __uint_as_float(column[i & 1] & ~0xFFFFu), d[i]);
      }
    }
  }
}
#endif

// d += a b for 16 x 8 x 16 numbers of bfloat16; a by rows, b by columns.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CUDA_HOST)
  ::cuda_host::mma_bf16(d, a, b);
#elif defined(FD_BEFORE_SM80)
  mma_by_shuffles(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += a b for 16 x 8 x 16 numbers of float16; a by rows, b by columns.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CUDA_HOST)
  ::cuda_host::mma_f16(d, a, b);
#elif defined(FD_BEFORE_SM80)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The bits of `x` rounded to TF32 (10 bits of mantissa), ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if defined(CUDA_HOST)
  return ::cuda_host::to_tf32(x);
#elif defined(FD_BEFORE_SM80)
  return __float_as_uint(x);  // never multiplied
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// NaN where either is.
__device__ __forceinline__ float maximum(float a, float b) {
#if defined(CUDA_HOST) || defined(FD_BEFORE_SM80)
  return a > b || a != a ? a : b;
#else
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#endif
}

// Both numbers rounded to 16 bits, `low` in the lower half; zero where negative, NaN where NaN.
__device__ __forceinline__ uint32_t relu_bf16x2(float low, float high) {
#if defined(CUDA_HOST) || defined(FD_BEFORE_SM80)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low < 0 ? 0.0f : low, high < 0 ? 0.0f : high);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

__device__ __forceinline__ uint32_t relu_f16x2(float low, float high) {
#if defined(CUDA_HOST) || defined(FD_BEFORE_SM80)
  const __half2 pair = __floats2half2_rn(low < 0 ? 0.0f : low, high < 0 ? 0.0f : high);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// d += a b for 16 x 8 x 8 numbers of TF32, of which the hardware ignores the lowest 13 bits: round with to_tf32 first.
// a[i] is row g + 8 (i % 2), column t + 4 (i / 2); b[i] is row t + 4 i, column g.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CUDA_HOST)
  ::cuda_host::mma_tf32(d, a, b);
#elif defined(FD_BEFORE_SM80)
  __trap();  // the binding asks for TF32 from sm_80 on only
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned) and
// receives numbers 2 t and 2 t + 1 of row g of matrix i in r[i].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress p) {
#ifdef CUDA_HOST
  ::cuda_host::ldmatrix<4, false>(r, p);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p)
               : "memory");
#endif
}

// The same with each matrix transposed: rows 2 t and 2 t + 1 of column g.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress p) {
#ifdef CUDA_HOST
  ::cuda_host::ldmatrix<4, true>(r, p);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p)
               : "memory");
#endif
}

// 16 bytes to shared memory, aligned, by one instruction: the compiler may make four of an assignment, and these
// conflict.
__device__ __forceinline__ void store_shared(void* to, const uint4& v) {
#ifdef CUDA_HOST
  *static_cast<uint4*>(to) = v;
#else
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// Copies the first `valid` of Bytes (4, 8 or 16) from global to shared memory, both aligned to Bytes, and fills the
// rest with zeros. Nothing is read where `valid` is 0. It may be read after cp_async_wait and a barrier.
template <int Bytes>
__device__ __forceinline__ void cp_async_partial(void* to, const void* from, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if defined(CUDA_HOST)
  ::cuda_host::cp_async<Bytes>(to, from, valid);
#elif defined(FD_BEFORE_SM80)
  if (valid == Bytes) {
    if constexpr (Bytes == 16) *static_cast<uint4*>(to) = __ldg(static_cast<const uint4*>(from));
    if constexpr (Bytes == 8) *static_cast<uint2*>(to) = __ldg(static_cast<const uint2*>(from));
    if constexpr (Bytes == 4) *static_cast<unsigned*>(to) = __ldg(static_cast<const unsigned*>(from));
  } else {
    for (int i = 0; i < Bytes; ++i) {
      static_cast<unsigned char*>(to)[i] = i < valid ? static_cast<const unsigned char*>(from)[i] : 0;
    }
  }
#else
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes),
                 "r"(valid)
                 : "memory");
  }
#endif
}

// All of it, or zeros where not `wanted`.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, bool wanted = true) {
  cp_async_partial<Bytes>(to, from, wanted ? Bytes : 0);
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
#if defined(CUDA_HOST)
  ::cuda_host::cp_async_commit();
#elif !defined(FD_BEFORE_SM80)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the newest `Keep` groups of this thread have arrived.
template <int Keep>
__device__ __forceinline__ void cp_async_wait() {
#if defined(CUDA_HOST)
  ::cuda_host::cp_async_wait(Keep);
#elif !defined(FD_BEFORE_SM80)
  asm volatile("cp.async.wait_group %0;" ::"n"(Keep) : "memory");
#endif
}

}  // namespace fused_densenet
