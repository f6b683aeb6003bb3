// Data gradient, weight gradient and both per-channel sums of a convolution, from one reading of x and of the gradient.
//
// A block owns Channels channels of x and a run of boxes of pixels. Of a box, the gradient g with its halo is loaded,
// transformed and rounded once per element into shared memory, as is the recomputed activation a. Then
//     da[p, c] = sum over (tap, k) of g[p - tap, k] W[k, c, tap]      dW[(tap, k), c] += sum over p of g[p - tap, k]
//     a[p, c]
// read g at shifted rows; a tap's column group of eight outputs is the unit of both, so that k = 12 and nine taps take
// 18 groups and not 9 times 16 columns. Weights stay in shared memory, dW and the sums in registers, over all boxes of
// the block. The next box's bytes arrive by cp.async while the products of this one run.
#pragma once

#include "backward_plan.h"
#include "gradient.cuh"
#include "shifted_product.cuh"

namespace fused_densenet {

template <Arithmetic A_, int Pixels, int Channels, int WarpsM, int WarpsN, int RowTiles>
struct BackwardConfig {
  static constexpr Arithmetic A = A_;
  using T = typename Product<A>::T;
  static constexpr int pixels = Pixels, channels = Channels, warps_m = WarpsM, warps_n = WarpsN, row_tiles = RowTiles;
  static constexpr int threads = 32 * WarpsM * WarpsN;
  static constexpr int m_tiles = Pixels / (16 * WarpsM), n_tiles = Channels / (8 * WarpsN);
  static constexpr int ld = Channels + 8;
  static constexpr BackwardTile tile{sizeof(T), Pixels, Channels, threads, 16 * WarpsM * RowTiles};
  static_assert(Channels % 16 == 0 && m_tiles * 16 * WarpsM == Pixels && n_tiles % 2 == 0);
};

// The part of the (tap, output) rows that is in shared memory.
struct Pass {
  int first_output, outputs, first_tap, taps, groups;  // outputs: a multiple of eight
};

template <class C>
class BackwardBlock {
  using T = typename C::T;
  static constexpr int kSize = Chunk<T>::size;

 public:
  __device__ BackwardBlock(const Backward& f, const BackwardPlan& plan, unsigned char* shared)
      : f_(f),
        plan_(plan),
        first_channel_(blockIdx.x * C::channels),
        channels_(f.shape.in - first_channel_ < C::channels ? static_cast<int>(f.shape.in - first_channel_)
                                                            : C::channels) {
    weight_ = {reinterpret_cast<T*>(shared + plan.weight_at), plan.weight_ld};
    g_ = {reinterpret_cast<T*>(shared + plan.gradient_at), plan.gradient_ld};
    raw_ = reinterpret_cast<T*>(shared + plan.raw_at);
    x_ = reinterpret_cast<T*>(shared + plan.x_at);
    a_ = {reinterpret_cast<T*>(shared + plan.activation_at), C::ld};
    dx_ = reinterpret_cast<T*>(shared + plan.dx_at);
    g_vectors_ = reinterpret_cast<float*>(shared + plan.vectors_at);
    x_vectors_ = {g_vectors_ + 4 * plan.pass_outputs, C::channels};
    halo_pixels_ = reinterpret_cast<int*>(shared + plan.tables_at);
    box_pixels_ = halo_pixels_ + 2 * plan.halo_rows;
    row_of_ = box_pixels_ + 3 * C::pixels;
    groups_ = reinterpret_cast<Group*>(row_of_ + C::pixels);
    const int warp = threadIdx.x / 32;
    warp_m_ = warp / C::warps_n;
    column_ = warp % C::warps_n * C::n_tiles * 8;
    pairs_ = (channels_ - column_ + 15) / 16;
  }

  __device__ void run(float* weight_partials, float* sum_partials) {
    const int first = blockIdx.y * plan_.per_block;
    const int last = first + plan_.per_block < plan_.count ? first + plan_.per_block : plan_.count;
    const int first_pass = plan_.weight && !plan_.data ? blockIdx.z : 0;
    const int passes = plan_.data ? plan_.output_passes * plan_.tap_passes : 1;
    x_vectors_.load(f_.norm, first_channel_, channels_);
    locate_box();
    locate(first, 0, 0);
    Pass pass = pass_of(first_pass);
    load_pass(pass);
    load_gradient_vectors(pass);
    __syncthreads();
    fetch_x(0, 0);
    fetch_gradient(pass, 0);
    cp_async_commit();
    for (int tile = first; tile < last; ++tile) {
      const int buffer = (tile - first) & 1, slot = (tile - first) % 3, next_slot = slot == 2 ? 0 : slot + 1;
      for (int i = 0; i < passes; ++i) {
        const bool more = i + 1 < passes || tile + 1 < last;
        const Pass next = passes == 1 ? pass : pass_of(i + 1 < passes ? i + 1 : 0);
        cp_async_wait<0>();
        __syncthreads();
        if (i == 0 && plan_.data && tile > first) store_dx(buffer ^ 1, slot == 0 ? 2 : slot - 1);
        if (passes > 1 && (tile > first || i > 0)) load_pass(pass);
        transform_gradient(pass, buffer);
        if (plan_.weight) transform_x(buffer, slot);
        if (i + 1 == passes && more) locate(tile + 1, buffer ^ 1, next_slot);
        __syncthreads();
        if (more) {
          if (passes > 1) load_gradient_vectors(next);
          fetch_gradient(next, i + 1 < passes ? buffer : buffer ^ 1);
          if (i + 1 == passes) fetch_x(buffer ^ 1, next_slot);
        }
        cp_async_commit();
        if (plan_.data) {
          if (i == 0) clear(da_);
          data_product(pass);
          if (i + 1 == passes) finish_data(buffer, slot);
        }
        if (plan_.weight) weight_product(pass);
        pass = next;
      }
    }
    __syncthreads();
    if (plan_.data) {
      store_dx((last - 1 - first) & 1, (last - 1 - first) % 3);
      store_sums(sum_partials);
    }
    if (plan_.weight) store_weight(pass, weight_partials);
  }

 private:
  __device__ Matrix<T> x(int buffer) const { return {x_ + buffer * C::pixels * C::ld, C::ld}; }
  __device__ Matrix<T> dx(int buffer) const { return {dx_ + (f_.accumulate ? buffer * C::pixels * C::ld : 0), C::ld}; }

  // body(row, first column) for chunks of 16 bytes; a thread keeps its column.
  template <class Body>
  __device__ void for_each_chunk(int rows, int chunks, Body body) const {
    const int step = C::threads / chunks, column = threadIdx.x % chunks * kSize;
    if (static_cast<int>(threadIdx.x) >= step * chunks) return;
    for (int row = threadIdx.x / chunks; row < rows; row += step) body(row, column);
  }
  __device__ int x_chunks() const { return (channels_ + kSize - 1) / kSize; }

  __device__ Pass pass_of(int i) const {
    Pass p;
    const int taps = plan_.taps, outputs = (static_cast<int>(f_.shape.out) + 7) / 8 * 8;
    p.first_tap = i % plan_.tap_passes * plan_.pass_taps;
    p.taps = taps - p.first_tap < plan_.pass_taps ? taps - p.first_tap : plan_.pass_taps;
    p.first_output = i / plan_.tap_passes * plan_.pass_outputs;
    p.outputs = outputs - p.first_output < plan_.pass_outputs ? outputs - p.first_output : plan_.pass_outputs;
    p.groups = p.taps * (p.outputs / 8);
    return p;
  }

  __device__ void load_gradient_vectors(const Pass& pass) {
    const float* from[4] = {static_cast<const float*>(f_.grad.scale), static_cast<const float*>(f_.grad.slope),
                            static_cast<const float*>(f_.grad.mean), static_cast<const float*>(f_.grad.offset)};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      for (int k = threadIdx.x; k < pass.outputs; k += C::threads) {
        const int output = pass.first_output + k;
        g_vectors_[v * plan_.pass_outputs + k] = output < f_.shape.out ? from[v][output] : 0;
      }
    }
  }

  // The rows of g that lie under a box's pixels, before a tap's shift.
  __device__ void locate_box() {
    const int* box = plan_.box;
    for (int p = threadIdx.x; p < C::pixels; p += C::threads) {
      const int w = p % box[3], h = p / box[3] % box[2], d = p / (box[3] * box[2]) % box[1];
      const int n = p / (box[3] * box[2] * box[1]);
      row_of_[p] = n < box[0] ? ((n * plan_.halo[1] + d) * plan_.halo[2] + h) * plan_.halo[3] + w : 0;
    }
  }

  // The pixels of a box and of its halo in the image, -1 outside of it.
  __device__ void locate(int tile, int buffer, int slot) {
    const int* tiles = plan_.tiles;
    const int w0 = tile % tiles[3] * plan_.box[3], h0 = tile / tiles[3] % tiles[2] * plan_.box[2];
    const int d0 = tile / (tiles[3] * tiles[2]) % tiles[1] * plan_.box[1];
    const int n0 = tile / (tiles[3] * tiles[2] * tiles[1]) * plan_.box[0];
    for (int i = threadIdx.x; i < plan_.halo_rows + C::pixels; i += C::threads) {
      const bool inner = i >= plan_.halo_rows;
      const int p = inner ? i - plan_.halo_rows : i;
      const int* size = inner ? plan_.box : plan_.halo;
      const int n = p / (size[3] * size[2] * size[1]);
      const int w = w0 + p % size[3] - (inner ? 0 : plan_.radius[2]);
      const int h = h0 + p / size[3] % size[2] - (inner ? 0 : plan_.radius[1]);
      const int d = d0 + p / (size[3] * size[2]) % size[1] - (inner ? 0 : plan_.radius[0]);
      (inner ? box_pixels_ + slot * C::pixels : halo_pixels_ + buffer * plan_.halo_rows)[p] =
          n < size[0] ? pixel(n0 + n, d, h, w) : -1;
    }
  }
  __device__ int pixel(int n, int d, int h, int w) const {
    const Shape& s = f_.shape;
    if (plan_.taps == 1) return w < s.n * s.d * s.h * s.w ? w : -1;
    const bool inside = n < s.n && d >= 0 && d < s.d && h >= 0 && h < s.h && w >= 0 && w < s.w;
    return inside ? ((n * static_cast<int>(s.d) + d) * static_cast<int>(s.h) + h) * static_cast<int>(s.w) + w : -1;
  }

  // The pass's groups and, for the data gradient, its weights: rows are channels of x, columns taps by outputs.
  __device__ void load_pass(const Pass& pass) {
    const Shape& s = f_.shape;
    const int *halo = plan_.halo, kw = static_cast<int>(s.kw), kh = static_cast<int>(s.kh), of_tap = pass.outputs / 8;
    for (int j = threadIdx.x; j < pass.groups + (pass.groups & 1); j += C::threads) {
      const int i = j < pass.groups ? j : pass.groups - 1;  // the last step's second half may be its first again
      const int tap = pass.first_tap + i / of_tap;
      const int d = 2 * plan_.radius[0] - tap / (kw * kh), h = 2 * plan_.radius[1] - tap / kw % kh;
      groups_[j] = Group::of((d * halo[2] + h) * halo[3] + 2 * plan_.radius[2] - tap % kw, i % of_tap * 8);
    }
    if (!plan_.data) return;
    const Weight& w = f_.weight;
    const bool taps_first = w.stride_tap[2] < w.stride_in;
    for (int i = threadIdx.x; i < C::channels * 8 * pass.groups; i += C::threads) {
      const int tap = taps_first ? i % pass.taps : i / C::channels % pass.taps;
      const int c = taps_first ? i / pass.taps % C::channels : i % C::channels;
      const int k = i / (C::channels * pass.taps), t = pass.first_tap + tap;
      float value = 0;
      if (c < channels_ && pass.first_output + k < s.out) {
        const int64_t from = (pass.first_output + k) * w.stride_out + (first_channel_ + c) * w.stride_in +
                             t / (kw * kh) * w.stride_tap[0] + t / kw % kh * w.stride_tap[1] + t % kw * w.stride_tap[2];
        value = w.is_float ? static_cast<const float*>(w.data)[from] : as_float(static_cast<const T*>(w.data)[from]);
      }
      *weight_.at(c, tap * pass.outputs + k) = Product<C::A>::number(value);
    }
    if (pass.groups & 1) {
      for (int i = threadIdx.x; i < C::channels * 8; i += C::threads) {
        *weight_.at(i / 8, 8 * pass.groups + i % 8) = Product<C::A>::number(0);
      }
    }
  }

  __device__ void fetch_gradient(const Pass& pass, int buffer) {
    const int* pixels = halo_pixels_ + buffer * plan_.halo_rows;
    const T *stored = static_cast<const T*>(f_.grad.stored.data) + pass.first_output,
            *value = static_cast<const T*>(f_.grad.value.data) + pass.first_output;
    const int outputs = static_cast<int>(f_.shape.out) - pass.first_output;
    T* const raw_value = raw_ + plan_.halo_rows * plan_.pass_outputs;
    for_each_chunk(plan_.halo_rows, pass.outputs / kSize, [&](int row, int column) {
      const int64_t p = pixels[row];
      if (p < 0) return;
      const int at = row * plan_.pass_outputs + column;
      copy_numbers(raw_ + at, stored + p * f_.grad.stored.ld + column, outputs - column, plan_.stored_access);
      copy_numbers(raw_value + at, value + p * f_.grad.value.ld + column, outputs - column, plan_.value_access);
    });
  }

  __device__ void fetch_x(int buffer, int slot) {
    const int* pixels = box_pixels_ + slot * C::pixels;
    const T* from = static_cast<const T*>(f_.x.data) + first_channel_;
    const T* old = static_cast<const T*>(f_.dx.data) + first_channel_;
    const bool old_too = plan_.data && f_.accumulate;
    for_each_chunk(C::pixels, x_chunks(), [&](int row, int column) {
      const int64_t p = pixels[row];
      if (p < 0) return;
      copy_numbers(x(buffer).at(row, column), from + p * f_.x.ld + column, channels_ - column, plan_.x_access);
      if (old_too) {
        copy_numbers(dx(buffer).at(row, column), old + p * f_.dx.ld + column, channels_ - column, plan_.dx_access);
      }
    });
  }

  __device__ void transform_gradient(const Pass& pass, int buffer) {
    const int* pixels = halo_pixels_ + buffer * plan_.halo_rows;
    const int chunks = pass.outputs / kSize, column = threadIdx.x % chunks * kSize, step = plan_.pass_outputs;
    float scale[kSize], slope[kSize], mean[kSize], offset[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float* vector = g_vectors_ + column + i;
      scale[i] = vector[0], slope[i] = vector[step], mean[i] = vector[2 * step], offset[i] = vector[3 * step];
    }
    for_each_chunk(plan_.halo_rows, chunks, [&](int row, int) {
      Chunk<T> out;
      const bool inside = pixels[row] >= 0;
      const T* from = raw_ + row * step + column;
      const Chunk<T> stored = *reinterpret_cast<const Chunk<T>*>(from);
      const Chunk<T> value = *reinterpret_cast<const Chunk<T>*>(from + plan_.halo_rows * step);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float loaded = load_gradient(as_float(stored.element[i]), as_float(value.element[i]), scale[i], slope[i],
                                           mean[i], offset[i]);
        out.element[i] = Product<C::A>::number(inside ? loaded : 0.0f);
      }
      *reinterpret_cast<Chunk<T>*>(g_.at(row, column)) = out;
    });
  }

  __device__ void transform_x(int buffer, int slot) {
    const int* pixels = box_pixels_ + slot * C::pixels;
    const int column = threadIdx.x % x_chunks() * kSize;
    const Affine<C::A> affine(x_vectors_, column);
    for_each_chunk(C::pixels, x_chunks(), [&](int row, int) {
      Chunk<T> out;
      const bool inside = pixels[row] >= 0;
      const Chunk<T> in = *reinterpret_cast<const Chunk<T>*>(x(buffer).at(row, column));
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float z = normalised(as_float(in.element[i]), affine.mean[i], affine.scale[i], affine.shift[i]);
        out.element[i] = Product<C::A>::number(inside ? relu(z) : 0.0f);
      }
      *reinterpret_cast<Chunk<T>*>(a_.at(row, column)) = out;
    });
  }

  __device__ static void clear(float (&acc)[C::m_tiles][C::n_tiles][4]) {
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i) {
#pragma unroll
      for (int j = 0; j < C::n_tiles; ++j) {
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[i][j][q] = 0;
      }
    }
  }

  __device__ void data_product(const Pass& pass) {
    constexpr int each = Product<C::A>::kRows;
    const int lane = threadIdx.x & 31;
    int rows[C::m_tiles][each];
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i) {
#pragma unroll
      for (int h = 0; h < each; ++h) {
        rows[i][h] = row_of_[(warp_m_ * C::m_tiles + i) * 16 + Product<C::A>::left_row(lane, h)];
      }
    }
    const int steps = (8 * pass.groups + kDepth<C::A> - 1) / kDepth<C::A>;
    for (int step = 0; step < steps; ++step) {
      shifted_step<C::A>(da_, g_, rows, groups_, weight_, column_, step, pairs_);
    }
  }

  __device__ void weight_product(const Pass& pass) {
    const int* box = plan_.box;
    const int pixels = box[0] * box[1] * box[2] * box[3];
    for (int base = 0; base < pixels; base += kOuterDepth<T>) {
      outer_step<C::A>(dweight_, g_, row_of_, groups_, warp_m_, C::warps_m, (pass.groups + 1) / 2, a_, column_, base,
                       pairs_);
    }
  }

  // ReLU's mask, the sums, and what goes into dx, in shared memory.
  __device__ void finish_data(int buffer, int slot) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int* pixels = box_pixels_ + slot * C::pixels;
#pragma unroll
    for (int j = 0; j < C::n_tiles; ++j) {
      if (j / 2 >= pairs_) break;
      const int c = column_ + 8 * j + 2 * t;
      const float* const vector = x_vectors_.data + c;
      const float2 mean = load2(vector), scale = load2(vector + C::channels), shift = load2(vector + 2 * C::channels);
#pragma unroll
      for (int i = 0; i < C::m_tiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int p = (warp_m_ * C::m_tiles + i) * 16 + g + 8 * h;
          if (pixels[p] < 0) continue;
          const float2 in = load2(x(buffer).at(p, c));
          float dz[2] = {da_[i][j][2 * h], da_[i][j][2 * h + 1]};
          if (normalised(in.x, mean.x, scale.x, shift.x) <= 0) dz[0] = 0;
          if (normalised(in.y, mean.y, scale.y, shift.y) <= 0) dz[1] = 0;
          sum_[j][0] += dz[0], sum_[j][1] += dz[1];
          centered_[j][0] = fmaf(dz[0], in.x - mean.x, centered_[j][0]);
          centered_[j][1] = fmaf(dz[1], in.y - mean.y, centered_[j][1]);
          T* to = dx(buffer).at(p, c);
          if (f_.accumulate) {
            const float2 old = load2(to);
            dz[0] = fmaf(scale.x, dz[0], old.x), dz[1] = fmaf(scale.y, dz[1], old.y);
          }
          store2(to, dz[0], dz[1]);
        }
      }
    }
  }

  __device__ void store_dx(int buffer, int slot) {
    const int* pixels = box_pixels_ + slot * C::pixels;
    T* const to = static_cast<T*>(f_.dx.data) + first_channel_;
    for_each_chunk(C::pixels, x_chunks(), [&](int row, int column) {
      const int64_t p = pixels[row];
      if (p >= 0)
        store_chunk(to + p * f_.dx.ld + column, dx(buffer).at(row, column), channels_ - column, plan_.dx_access);
    });
  }

  // Sums over the warps that share channels, then to row blockIdx.y of the partial sums, (splits, 2, in).
  __device__ void store_sums(float* partials) {
    const int lane = threadIdx.x & 31;
    float* const scratch = reinterpret_cast<float*>(x_);  // (warps_m, 2, channels)
#pragma unroll
    for (int j = 0; j < C::n_tiles; ++j) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float a = sum_[j][q], b = centered_[j][q];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          a += __shfl_xor_sync(~0u, a, offset);
          b += __shfl_xor_sync(~0u, b, offset);
        }
        if (lane < 4) {
          float* const to = scratch + warp_m_ * 2 * C::channels + column_ + 8 * j + 2 * lane + q;
          to[0] = a, to[C::channels] = b;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * C::channels; i += C::threads) {
      const int c = i % C::channels;
      if (c >= channels_) continue;
      float sum = 0;
#pragma unroll
      for (int m = 0; m < C::warps_m; ++m) sum += scratch[m * 2 * C::channels + i];
      partials[(static_cast<int64_t>(blockIdx.y) * 2 + i / C::channels) * f_.shape.in + first_channel_ + c] = sum;
    }
  }

  // To slice blockIdx.y of the partial sums, (splits, taps, out, in).
  __device__ void store_weight(const Pass& pass, float* partials) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, of_tap = pass.outputs / 8;
    const int64_t in = f_.shape.in, out = f_.shape.out;
    float* const slice = partials + blockIdx.y * (plan_.taps * out * in) + first_channel_;
#pragma unroll
    for (int i = 0; i < C::row_tiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int group = 2 * (warp_m_ + C::warps_m * i) + h;
        if (group >= pass.groups) break;
        const int k = pass.first_output + group % of_tap * 8 + g;
        if (k >= out) continue;
        float* const to = slice + ((pass.first_tap + group / of_tap) * out + k) * in;
#pragma unroll
        for (int j = 0; j < C::n_tiles; ++j) {
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const int c = column_ + 8 * j + 2 * t + q;
            if (c < channels_) to[c] = dweight_[i][j][2 * h + q];
          }
        }
      }
    }
  }

  const Backward& f_;
  const BackwardPlan& plan_;
  const int first_channel_, channels_;
  Matrix<T> weight_, g_, a_;
  T *raw_, *x_, *dx_;
  float* g_vectors_;
  Vectors x_vectors_;
  int *halo_pixels_, *box_pixels_, *row_of_;
  Group* groups_;
  int warp_m_, column_, pairs_;
  float da_[C::m_tiles][C::n_tiles][4];
  float dweight_[C::row_tiles][C::n_tiles][4] = {};
  float sum_[C::n_tiles][2] = {}, centered_[C::n_tiles][2] = {};
};

template <class C>
__global__ void __launch_bounds__(C::threads)
    backward_kernel(Backward f, BackwardPlan plan, float* weight_partials, float* sum_partials) {
  DYN_SMEM(shared);
  BackwardBlock<C>(f, plan, shared).run(weight_partials, sum_partials);
}

}  // namespace fused_densenet
