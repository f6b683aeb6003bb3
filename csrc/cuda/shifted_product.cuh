// Products whose left operand are shifted rows of one tile in shared memory: a convolution's gradients, a tap at a
// time.
//
// Eight columns, a group, are the unit that a shift applies to, so that the depth of the tensor cores' 16 numbers, or
// 16 rows of a result, may belong to two taps. Accumulators are laid out as in product.cuh.
#pragma once

#include "gradient.cuh"

namespace fused_densenet {

// Where eight columns of a shifted operand begin: rows to add, and the first column. Of 16-bit numbers the sum of both
// offsets, in bytes; of others each.
struct Group {
  int packed;
  template <class T>
  __device__ __forceinline__ static Group of(int row, int column, int ld) {
    return {sizeof(T) == 2 ? 2 * (row * ld + column) : row << 16 | column};
  }
};

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
  // Column `column` of a group, in the row that is the group's shift below `row`.
  __device__ __forceinline__ T* shifted(int row, Group by, int column) const {
    if (sizeof(T) == 2) return data + row * ld + by.packed / 2 + column;
    return at(row + (by.packed >> 16), (by.packed & 0xFFFF) + column);
  }
};

// Numbers of 16 rows and 16 columns as a lane has them in accumulators: at(2 j + i) are row g + 8 i, columns 8 j + 2 t
// and the next. Zeros where nothing is loaded. For whole warps; rows behind `last` are it.
template <class T>
struct TilePart {
  static constexpr bool narrow = sizeof(T) == 2;
  uint32_t words[narrow ? 4 : 8] = {};

  __device__ __forceinline__ void load(const Matrix<T>& from, int row, int last, int column) {
    const int lane = threadIdx.x & 31;
    if constexpr (narrow) {
      ldmatrix_x4(words, shared_address(from.at(min(row + (lane & 15), last), column + (lane >> 4) * 8)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair =
            load2(from.at(min(row + (lane >> 2) + 8 * (i & 1), last), column + 8 * (i >> 1) + 2 * (lane & 3)));
        words[2 * i] = __float_as_uint(pair.x);
        words[2 * i + 1] = __float_as_uint(pair.y);
      }
    }
  }
  __device__ __forceinline__ float2 at(int i) const {
    if constexpr (narrow) {
      return unpacked<T>(words[i]);
    } else {
      return make_float2(__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1]));
    }
  }
};

// Calls body(pair) for the pairs of N tiles that exist; with Full, which a loop is compiled for, all do.
template <int N, bool Full, class Body>
__device__ __forceinline__ void for_pairs(int pairs, Body body) {
#pragma unroll
  for (int pair = 0; pair < N / 2; ++pair) {
    if (!Full && pair >= pairs) break;
    body(pair);
  }
}

// acc += a[rows + shift, groups] * b[columns, all numbers]^T for 16 M rows, 8 N columns and `depth` numbers of b's
// rows. rows[i][h]: the rows of `a` under rows Product<A>::left_row(lane, h) of tile i. Of b's columns, `pairs` times
// 16 count. Unshifted, groups lie one after the other, with zeros behind an odd number of them; 16-bit numbers only.
template <Arithmetic A, bool Full, bool Unshifted, class T, int M, int N>
__device__ __forceinline__ void shifted_product(float (&acc)[M][N][4], const Matrix<T>& a,
                                                const int (&rows)[M][Product<A>::kRows], const Group* groups,
                                                const Matrix<T>& b, int column, int depth, int pairs) {
  using P = Product<A>;
  constexpr int size = sizeof(T), step = P::kBytes / size;
  const int lane = threadIdx.x & 31;
  const int own = P::left_offset(lane) / size;  // ldmatrix gives the step's upper half to the upper lanes
  SharedAddress left_at[M], right_at[N / 2];
#pragma unroll
  for (int i = 0; i < M; ++i) left_at[i] = shared_address(a.data + rows[i][0] * a.ld + own % 8);
#pragma unroll
  for (int pair = 0; pair < N / 2; ++pair) {
    right_at[pair] =
        shared_address(b.at(column + 16 * pair + (lane & 7) + (lane >> 4) * 8, (lane >> 3 & 1) * (step / 2)));
  }
#pragma unroll 4
  for (int at = 0; at < depth; at += step) {
    const Group e = Unshifted ? Group::of<T>(0, at + own, 0) : groups[(at + own) / 8];
    typename P::Left left[M];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if constexpr (A == Arithmetic::f32) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          left[i].r[h] = *reinterpret_cast<const float4*>(a.shifted(rows[i][h], e, at % 8));
        }
      } else if constexpr (size == 2) {
        ldmatrix_x4(left[i].r, left_at[i] + e.packed);
      } else {
        ldmatrix_x4(left[i].r, shared_address(a.shifted(rows[i][0], e, own % 8)));
      }
    }
    for_pairs<N, Full>(pairs, [&](int pair) {
      typename P::Right right;
      if constexpr (A == Arithmetic::f32) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = column + 16 * pair + 8 * (j / 2) + 2 * (lane & 3) + j % 2;
          right.r[j / 2][j % 2] = *reinterpret_cast<const float4*>(b.at(row, at));
        }
      } else {
        ldmatrix_x4(right.r, right_at[pair] + at * size);
      }
#pragma unroll
      for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) P::multiply(acc[i][2 * pair + half], left[i], right, half);
      }
    });
  }
}

// acc += sum over rows r < depth of a[row_of[r] + shift, groups]^T * b[r, columns]: M tiles of two groups, first, first
// + stride, ... below `tiles`, by 8 N columns. Unshifted, row_of is the identity, and groups are as above.
template <Arithmetic A, bool Full, bool Unshifted, class T, int M, int N>
__device__ __forceinline__ void outer_product(float (&acc)[M][N][4], const Matrix<T>& a, const int* row_of,
                                              const Group* groups, int first, int stride, int tiles, const Matrix<T>& b,
                                              int column, int depth, int pairs) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  if constexpr (A == Arithmetic::f32) {
    // The step's products are added up before they are added to the rest: a chain an eighth as long rounds less.
    constexpr int step = 8;
#pragma unroll 1
    for (int base = 0; base < depth; base += step) {
      float2 right[step][N];
      int rows[step];
#pragma unroll
      for (int r = 0; r < step; ++r) {
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
          for (int r = 0; r < step; ++r) {
            const float left = *a.shifted(rows[r], e, g);
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
    }
  } else {
    constexpr bool narrow = sizeof(T) == 2;  // 32-bit numbers cannot be transposed by ldmatrix
    constexpr int step = narrow ? 16 : 8;
    const T* right_near = b.at(t, column + g);
    const T* right_far = b.at(t + 4, column + g);
    const SharedAddress right_at = shared_address(b.data + (lane & 15) * b.ld + column + (lane >> 4) * 8);
    const SharedAddress left_at = shared_address(a.data);
    int shift[narrow ? M : 1];
#pragma unroll
    for (int i = 0; i < (narrow ? M : 1); ++i) {
      const int group = 2 * (Unshifted ? first + stride * i : min(first + stride * i, tiles - 1)) + (lane >> 3 & 1);
      shift[i] = Unshifted ? Group::of<T>(0, 8 * group, 0).packed : narrow ? groups[group].packed : 0;
    }
    for (int base = 0; base < depth; base += step) {
      typename Product<A>::Right right[N / 2];
      for_pairs<N, Full>(pairs, [&](int pair) {
        if constexpr (narrow) {
          ldmatrix_x4_trans(right[pair].r, right_at + (base * b.ld + 16 * pair) * int{sizeof(T)});
        } else {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const T* const from = q & 1 ? right_far : right_near;
            right[pair].r[q] = __float_as_uint(from[base * b.ld + 16 * pair + 8 * (q >> 1)]);
          }
        }
      });
      const int own_row = base + (narrow ? (lane & 7) + (lane >> 4) * 8 : t),
                near = Unshifted ? own_row : row_of[own_row];
      const int far = row_of[base + (narrow ? 0 : t + 4)];
      const SharedAddress left_row = left_at + near * a.ld * int{sizeof(T)};
#pragma unroll
      for (int i = 0; i < M; ++i) {
        if (first + stride * i >= tiles) break;
        [[maybe_unused]] const Group* e = groups + 2 * (first + stride * i);
        typename Product<A>::Left left;
        if constexpr (narrow) {
          ldmatrix_x4_trans(left.r, left_row + shift[i]);
        } else {
#pragma unroll
          for (int q = 0; q < 4; ++q) left.r[q] = __float_as_uint(*a.shifted(q < 2 ? near : far, e[q & 1], g));
        }
        for_pairs<N, Full>(pairs, [&](int pair) {
#pragma unroll
          for (int half = 0; half < 2; ++half) Product<A>::multiply(acc[i][2 * pair + half], left, right[pair], half);
        });
      }
    }
  }
}

}  // namespace fused_densenet
