// Products whose left operand are shifted rows of one tile in shared memory: a convolution's gradients, a tap at a
// time.
//
// Eight columns, a group, are the unit that a shift applies to, so that the depth of the tensor cores' 16 numbers, or
// 16 rows of a result, may belong to two taps. Accumulators are laid out as in product.cuh.
#pragma once

#include "gradient.cuh"

namespace fused_densenet {

// Rows of numbers in shared memory, `ld` = 8 times an odd number apart. ldmatrix reads 16 bytes of eight neighbouring
// rows: with 16-bit numbers they lie an odd number of 16-byte units apart, so in different banks. 32-bit numbers are
// also read as eight neighbours of four rows: rows lie 8 banks apart (modulo 16), and exchanging the halves of each
// eight in every other four rows keeps ldmatrix's eight rows apart too.
template <class T>
struct Matrix {
  T* data;
  int ld;
  __device__ __forceinline__ T* at(int row, int column) const {
    return data + row * ld + (sizeof(T) == 4 ? column ^ (row & 4) : column);
  }
};

// Where eight columns of a shifted operand begin: rows to add, and the first column.
struct Group {
  int packed;
  __device__ __forceinline__ static Group of(int row, int column) { return {row << 16 | column}; }
  __device__ __forceinline__ int row() const { return packed >> 16; }
  __device__ __forceinline__ int column() const { return packed & 0xFFFF; }
};

// Numbers of a row (or rows of a product) that one step takes.
template <Arithmetic A>
constexpr int kDepth = Product<A>::kBytes / static_cast<int>(sizeof(typename Product<A>::T));

// acc += a[rows + shift, the step's columns of groups] * b[columns, the step's depth]^T for 16 M rows and 8 N columns.
// rows[i][h]: the rows of `a` under rows Product<A>::left_row(lane, h) of tile i. Of b's columns, `pairs` times 16
// count.
template <Arithmetic A, class T, int M, int N>
__device__ __forceinline__ void shifted_step(float (&acc)[M][N][4], const Matrix<T>& a,
                                             const int (&rows)[M][Product<A>::kRows], const Group* groups,
                                             const Matrix<T>& b, int column, int step, int pairs) {
  using P = Product<A>;
  constexpr int depth = kDepth<A>;
  const int lane = threadIdx.x & 31;
  // Where the lane's 16 bytes lie in the step: ldmatrix gives its upper half to the upper lanes.
  const int from = depth * step + P::left_offset(lane) / static_cast<int>(sizeof(T));
  const Group e = groups[from / 8];
  typename P::Left left[M];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if constexpr (A == Arithmetic::f32) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        left[i].r[h] = *reinterpret_cast<const float4*>(a.at(rows[i][h] + e.row(), e.column() + from % 8));
      }
    } else {
      ldmatrix_x4(left[i].r, a.at(rows[i][0] + e.row(), e.column() + from % 8));
    }
  }
#pragma unroll
  for (int pair = 0; pair < N / 2; ++pair) {
    if (pair >= pairs) break;
    typename P::Right right;
    const int first = column + 16 * pair;
    if constexpr (A == Arithmetic::f32) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = first + 8 * (j / 2) + 2 * (lane & 3) + j % 2;
        right.r[j / 2][j % 2] = *reinterpret_cast<const float4*>(b.at(row, depth * step));
      }
    } else {
      ldmatrix_x4(right.r, b.at(first + (lane & 7) + (lane >> 4) * 8, depth * step + (lane >> 3 & 1) * (depth / 2)));
    }
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) P::multiply(acc[i][2 * pair + half], left[i], right, half);
    }
  }
}

// Rows that one step of an outer product takes.
template <class T>
constexpr int kOuterDepth = sizeof(T) == 2 ? 16 : 8;

// acc += sum over rows r of the step from `base` of a[row_of[r] + shift, groups]^T * b[r, columns]: M tiles of two
// groups, first, first + stride, ... below `tiles`, by 8 N columns.
template <Arithmetic A, class T, int M, int N>
__device__ __forceinline__ void outer_step(float (&acc)[M][N][4], const Matrix<T>& a, const int* row_of,
                                           const Group* groups, int first, int stride, int tiles, const Matrix<T>& b,
                                           int column, int base, int pairs) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  if constexpr (A == Arithmetic::f32) {
    // The step's products are added up before they are added to the rest: a chain an eighth as long rounds less.
    constexpr int depth = kOuterDepth<T>;
    float2 right[depth][N];
    int rows[depth];
#pragma unroll
    for (int r = 0; r < depth; ++r) {
      rows[r] = row_of[base + r];
#pragma unroll
      for (int j = 0; j < N; ++j) right[r][j] = load2(b.at(base + r, column + 8 * j + 2 * t));
    }
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (first + stride * i >= tiles) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Group e = groups[2 * (first + stride * i) + h];
        float2 sum[N] = {};
#pragma unroll
        for (int r = 0; r < depth; ++r) {
          const float left = *a.at(rows[r] + e.row(), e.column() + g);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            sum[j].x = fmaf(left, right[r][j].x, sum[j].x);
            sum[j].y = fmaf(left, right[r][j].y, sum[j].y);
          }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
          acc[i][j][2 * h] += sum[j].x;
          acc[i][j][2 * h + 1] += sum[j].y;
        }
      }
    }
  } else {
    constexpr bool narrow = sizeof(T) == 2;  // 32-bit numbers cannot be transposed by ldmatrix
    typename Product<A>::Right right[N / 2];
#pragma unroll
    for (int pair = 0; pair < N / 2; ++pair) {
      if (pair >= pairs) break;
      const int from = column + 16 * pair;
      if constexpr (narrow) {
        ldmatrix_x4_trans(right[pair].r, b.at(base + (lane & 15), from + (lane >> 4) * 8));
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          right[pair].r[q] = __float_as_uint(*b.at(base + t + 4 * (q & 1), from + 8 * (q >> 1) + g));
        }
      }
    }
    const int near = row_of[base + (narrow ? (lane & 7) + (lane >> 4) * 8 : t)];
    const int far = row_of[base + (narrow ? 0 : t + 4)];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (first + stride * i >= tiles) break;
      const Group* e = groups + 2 * (first + stride * i);
      typename Product<A>::Left left;
      if constexpr (narrow) {
        const Group own = e[lane >> 3 & 1];
        ldmatrix_x4_trans(left.r, a.at(near + own.row(), own.column()));
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          left.r[q] = __float_as_uint(*a.at((q < 2 ? near : far) + e[q & 1].row(), e[q & 1].column() + g));
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j / 2 >= pairs) break;
        Product<A>::multiply(acc[i][j], left, right[j / 2], j % 2);
      }
    }
  }
}

}  // namespace fused_densenet
