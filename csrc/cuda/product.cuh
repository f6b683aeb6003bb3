// Products of 16 x 16 tiles, 16 or 32 bytes of channels at a time, of two operands that lie in shared memory with their
// channels side by side: pixels in rows on the left, output channels in rows on the right. Rows are an odd number of
// 16-byte chunks apart, so that eight of them lie in different banks.
//
// kTiles is how many tiles of 16 pixels a warp's registers hold, kApart whether a stage is summed apart from the
// others. All arithmetics share one layout of the sums: with g = lane / 4 and t = lane % 4, d[half][2 i + j] is row g +
// 8 i, column 8 half + 2 t + j.
#pragma once

#include "launch.h"
#include "numbers.cuh"
#include "ptx.cuh"

namespace fused_densenet {

template <Arithmetic>
struct Product;

// Of a packed weight.
template <bool Global, class Chunk>
__device__ __forceinline__ Chunk packed_chunk(const Chunk* from) {
  if constexpr (Global) {
    return __ldg(from);
  } else {
    return *from;
  }
}

// By tensor cores, with one of ptx.cuh's products. A lane gives the address of one row of each operand to ldmatrix.
template <class Type, auto mma>
struct TensorCores {
  using T = Type;
  static constexpr int kBytes = 32, kRows = 1, kTiles = 4;
  static constexpr bool kApart = false;
  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[4];
  };

  // Which row of a 16-row tile the lane addresses, and where on both sides the bytes begin that it addresses.
  static __device__ int left_row(int lane, int) { return lane & 15; }
  static __device__ int left_offset(int lane) { return lane >> 4 << 4; }
  static __device__ int right_offset(int lane, int pitch) {
    return ((lane & 7) + (lane >> 4) * 8) * pitch + (lane >> 3 & 1) * 16;
  }
  static __device__ void load(Left& a, const unsigned char* row, const int (&offset)[kRows]) {
    ldmatrix_x4(a.r, shared_address(row) + offset[0]);
  }
  static __device__ void load(Right& b, const unsigned char* rows, int) { ldmatrix_x4(b.r, shared_address(rows)); }
  static __device__ void multiply(float (&d)[4], const Left& a, const Right& b, int half) {
    const uint32_t columns[2] = {b.r[2 * half], b.r[2 * half + 1]};
    mma(d, a.r, columns);
  }

  // 16 columns in the order of fragments, 512 bytes of global memory or of a copy in shared memory: each lane reads 16
  // bytes of its own, which begin at its offset.
  static constexpr int kFragments = 512;
  static __device__ int packed_offset(int lane) { return 16 * lane; }
  template <bool Global>
  static __device__ void load_packed(Right& b, const unsigned char* from) {
    const uint4 v = packed_chunk<Global>(reinterpret_cast<const uint4*>(from));
    b.r[0] = v.x;
    b.r[1] = v.y;
    b.r[2] = v.z;
    b.r[3] = v.w;
  }
  // Which column, and which channel of the step, number `i` of the 512 bytes is.
  static __device__ int2 packed_place(int i) {
    constexpr int each = 4 / sizeof(T);
    const int lane = i / (4 * each), r = i / each % 4;
    return make_int2(8 * (r >> 1) + (lane >> 2), (4 * (r & 1) + (lane & 3)) * each + i % each);
  }
};

template <>
struct Product<Arithmetic::bf16> : TensorCores<__nv_bfloat16, mma_bf16> {
  static __device__ T number(float x) { return rounded<T>(x); }
  static __device__ uint32_t rectified(float low, float high) { return relu_bf16x2(low, high); }
};

template <>
struct Product<Arithmetic::f16> : TensorCores<__half, mma_f16> {
  static __device__ T number(float x) { return rounded<T>(x); }
  static __device__ uint32_t rectified(float low, float high) { return relu_f16x2(low, high); }
};

// The left operand is rounded to TF32 where it is normalised, the right one here.
template <>
struct Product<Arithmetic::tf32> : TensorCores<float, mma_tf32> {
  static __device__ T number(float x) { return __uint_as_float(to_tf32(x)); }
  static __device__ void load(Right& b, const unsigned char* rows, int) {
    ldmatrix_x4(b.r, shared_address(rows));
#pragma unroll
    for (int i = 0; i < 4; ++i) b.r[i] = to_tf32(__uint_as_float(b.r[i]));
  }
  using TensorCores<float, mma_tf32>::load;
};

// By fused multiply-adds, four channels at a time. Lanes with the same g, or the same t, read the same address. Chains
// of additions are kept short, for the error of a library's blocked sums: four products are added before they join the
// sum, one instruction more in five, and the forward sums each stage apart, with a second set of sums and fewer tiles.
template <>
struct Product<Arithmetic::f32> {
  using T = float;
  static constexpr int kBytes = 16, kRows = 2, kTiles = 2;
  static constexpr bool kApart = true;
  struct Left {
    float4 r[2];
  };
  struct Right {
    float4 r[2][2];
  };

  static __device__ T number(float x) { return x; }
  static __device__ int left_row(int lane, int i) { return (lane >> 2) + 8 * i; }
  static __device__ int left_offset(int) { return 0; }
  static __device__ int right_offset(int lane, int pitch) { return 2 * (lane & 3) * pitch; }
  static __device__ void load(Left& a, const unsigned char* row, const int (&offset)[kRows]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) a.r[i] = *reinterpret_cast<const float4*>(row + offset[i]);
  }
  static __device__ void load(Right& b, const unsigned char* rows, int pitch) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 2; ++j) b.r[half][j] = *reinterpret_cast<const float4*>(rows + (8 * half + j) * pitch);
    }
  }
  static constexpr int kFragments = 256;
  static __device__ int packed_offset(int lane) { return 16 * (lane & 3); }
  template <bool Global>
  static __device__ void load_packed(Right& b, const unsigned char* from) {
    const float4* own = reinterpret_cast<const float4*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) b.r[i >> 1][i & 1] = packed_chunk<Global>(own + 4 * i);
  }
  static __device__ int2 packed_place(int i) {
    const int lane = i / 4 % 4, j = i / 16;
    return make_int2(8 * (j >> 1) + 2 * lane + (j & 1), i % 4);
  }
  static __device__ void multiply(float (&d)[4], const Left& a, const Right& b, int half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 &u = a.r[i], &v = b.r[half][j];
        d[2 * i + j] += fmaf(u.w, v.w, fmaf(u.z, v.z, fmaf(u.y, v.y, u.x * v.x)));
      }
    }
  }
};

}  // namespace fused_densenet
