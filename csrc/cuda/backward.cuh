// Data gradient, weight gradient and both per-channel sums of a convolution, from one reading of x and of the gradient.
//
// A block owns Channels channels of x and a run of boxes of pixels. Of a box, the gradient g with its halo is loaded,
// transformed and rounded once per element into shared memory, as is the recomputed activation a. Then
//     da[p, c] = sum over (tap, k) of g[p - tap, k] W[k, c, tap]     dW[(tap, k), c] += sum over p of g[p - tap, k]
//     a[p, c]
// read g at shifted rows; a tap's column group of eight outputs is the unit of both, so that k = 12 and nine taps take
// 18 groups and not nine times 16 columns. Weights stay in shared memory, dW and the sums in registers, over all boxes
// of the block. The next box's bytes arrive by cp.async while the products of this one run.
#pragma once

#include <type_traits>

#include "backward_operands.cuh"

namespace fused_densenet {

template <class C>
class BackwardBlock {
  using T = typename C::T;

 public:
  __device__ __forceinline__ BackwardBlock(const Backward& f, const BackwardPlan& plan, unsigned char* shared)
      : f_(f), plan_(plan), o_(f, plan, shared) {
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);  // the compiler sees that lanes agree
    warp_m_ = warp / C::warps_n;
    column_ = warp % C::warps_n * C::n_tiles * 8;
    pairs_ = (o_.channels - column_ + 15) / 16;
  }

  __device__ __forceinline__ void run(float* weight_partials, float* sum_partials) {
    const int first = blockIdx.y * plan_.per_block, last = min(first + plan_.per_block, plan_.count);
    const int passes = C::tile.adds_passes && plan_.data ? plan_.passes() : 1;
    Pass pass = o_.pass_of(plan_.data ? 0 : blockIdx.z);
    o_.x_vectors.template load<T>(f_.norm, o_.first_channel, o_.channels);
    o_.load_gradient_vectors(pass);
    o_.locate_rows();
    Box box = place_in(plan_.tiles, first);
    __syncthreads();
    o_.locate(first_pixel(box), 0, 0);
    __syncthreads();
    o_.fetch_x(0, 0);
    o_.fetch_gradient(pass, 0);
    cp_async_commit();
    o_.load_pass(pass);
    // Buffers alternate between boxes; where x lies is needed until dx is stored, in the next box's turn.
    for (int tile = first; tile < last; ++tile) {
      const int buffer = (tile - first) & 1, slot = (tile - first) % 3, next_slot = (tile - first + 1) % 3;
      for (int i = 0; i < passes; ++i) {
        const bool last_pass = i + 1 == passes, more = !last_pass || tile + 1 < last;
        const Pass next = passes == 1 ? pass : o_.pass_of(last_pass ? 0 : i + 1);
        cp_async_wait<0>();
        __syncthreads();
        if (i == 0 && plan_.data && tile > first) store_dx(buffer ^ 1, (slot + 2) % 3);
        if (passes > 1 && (tile > first || i > 0)) o_.load_pass(pass);
        o_.transform_gradient(pass, buffer);
        if (plan_.weight) o_.transform_x(buffer, slot);
        if (last_pass && more) o_.locate(first_pixel(box = next_box(box)), buffer ^ 1, next_slot);
        __syncthreads();
        if (more) {
          if (passes > 1) o_.load_gradient_vectors(next);
          o_.fetch_gradient(next, last_pass ? buffer ^ 1 : buffer);
          if (last_pass) o_.fetch_x(buffer ^ 1, next_slot);
        }
        cp_async_commit();
        if (plan_.data) {
          if (i == 0) clear_data();
          with_pairs([&](auto full) { data_product<decltype(full)::value>(pass); });
          if (last_pass) {
            with_activation(plan_.slope, [&](auto activation) {
              with_pairs([&](auto full) { finish_data<decltype(full)::value>(activation, buffer, slot); });
            });
          }
        }
        if (plan_.weight) with_pairs([&](auto full) { weight_product<decltype(full)::value>(pass); });
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
  // body(whether all of the warp's channels exist), if any do.
  template <class Body>
  __device__ void with_pairs(Body body) const {
    if (pairs_ >= C::n_tiles / 2) {
      body(std::true_type());
    } else if (pairs_ > 0) {
      body(std::false_type());
    }
  }

  __device__ int tile_row(int i) const { return (warp_m_ * C::m_tiles + i) * 16; }

  __device__ void clear_data() {
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i) {
#pragma unroll
      for (int j = 0; j < C::n_tiles; ++j) {
#pragma unroll
        for (int q = 0; q < 4; ++q) da_[i][j][q] = 0;
      }
    }
  }

  template <bool Full>
  __device__ void data_product(const Pass& pass) {
    if (tile_row(0) >= plan_.rows) return;
    constexpr int each = Product<C::A>::kRows;
    const int lane = threadIdx.x & 31;
    int rows[C::m_tiles][each];
#pragma unroll
    for (int i = 0; i < C::m_tiles; ++i) {
#pragma unroll
      for (int h = 0; h < each; ++h) {
        const int row = tile_row(i) + Product<C::A>::left_row(lane, h);
        rows[i][h] = C::pointwise ? min(row, plan_.rows - 1) : o_.row_of[row];
      }
    }
    shifted_product<C::A, Full, C::pointwise>(da_, o_.g, rows, o_.groups, o_.weight, column_, 8 * pass.groups, pairs_);
  }

  template <bool Full>
  __device__ void weight_product(const Pass& pass) {
    outer_product<C::A, Full, C::pointwise>(dweight_, o_.g, o_.row_of, o_.groups, warp_m_, C::warps_m,
                                            (pass.groups + 1) / 2, o_.a, column_, plan_.rows, pairs_);
  }

  // Of the plan's boxes, one after the other without a division.
  __device__ Box next_box(Box at) const {
    const Box& boxes = plan_.tiles;
    if (++at.w < boxes.w) return at;
    at.w = 0;
    if (++at.h < boxes.h) return at;
    at.h = 0;
    if (++at.d < boxes.d) return at;
    return {at.n + 1, 0, 0, 0};
  }
  // Of its halo.
  __device__ Box first_pixel(const Box& at) const {
    const Box &box = plan_.box, &kernel = plan_.kernel;
    return {at.n * box.n, at.d * box.d - kernel.d / 2, at.h * box.h - kernel.h / 2, at.w * box.w - kernel.w / 2};
  }

  // The activation's backward, the sums, and what goes into dx, in shared memory.
  template <bool Full, class Activation>
  __device__ void finish_data(Activation activation, int buffer, int slot) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int window = plan_.window_pixels, count = plan_.box_pixels;
    const Matrix<T> x = o_.x(buffer), dx = o_.dx(buffer);
    // A warp's channels do not cross 32: neighbouring fours are exchanged in all of them or in none.
    static_assert(32 % (8 * C::n_tiles) == 0);
    const float* const vectors = o_.x_vectors.at(0, column_ + 2 * t);
    if (window > 1) share_data(1.0f / static_cast<float>(window));
    for (int w = 0; w < window; ++w) {
      const int first = w * count + tile_row(0), last = (w + 1) * count - 1;
      T* const to = dx.at(first + g, column_ + 2 * t);
      cut_data(o_.x_pixels(slot) + first + g);
#pragma unroll
      for (int pair = 0; pair < C::n_tiles / 2; ++pair) {
        if (!Full && pair >= pairs_) break;
        float2 means[2], scales[2], shifts[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          means[j] = load2(vectors + 16 * pair + 8 * j);
          scales[j] = load2(vectors + C::channels + 16 * pair + 8 * j);
          shifts[j] = load2(vectors + 2 * C::channels + 16 * pair + 8 * j);
        }
#pragma unroll
        for (int i = 0; i < C::m_tiles; ++i) {
          if (tile_row(i) >= count) break;
          TilePart<T> in, old;
          in.load(x, first + 16 * i, last, column_ + 16 * pair);
          if (f_.accumulate) old.load(dx, first + 16 * i, last, column_ + 16 * pair);
          __syncwarp();  // lanes have read what others write
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int j = 2 * pair + q / 2, h = q & 1;
            const float2 mean = means[q / 2], scale = scales[q / 2], shift = shifts[q / 2];
            const float2 own = in.at(q), more = old.at(q);
            const float2 z =
                make_float2(normalised(own.x, mean.x, scale.x, shift.x), normalised(own.y, mean.y, scale.y, shift.y));
            const float2 dz =
                make_float2(activation.backward(da_[i][j][2 * h], z.x), activation.backward(da_[i][j][2 * h + 1], z.y));
            sums_[j][0] += dz.x;
            sums_[j][1] += dz.y;
            sums_[j][2] = fmaf(dz.x, own.x - mean.x, sums_[j][2]);
            sums_[j][3] = fmaf(dz.y, own.y - mean.y, sums_[j][3]);
            if (!in_box(i, h)) continue;
            store2(to + (16 * i + 8 * h) * C::ld + 8 * j, fmaf(scale.x, dz.x, more.x), fmaf(scale.y, dz.y, more.y));
          }
        }
      }
    }
  }

  // Whether this lane's row 16 i + 8 h of its warp is one of the box.
  __device__ bool in_box(int i, int h) const {
    return tile_row(i) + static_cast<int>(threadIdx.x & 31) / 4 + 8 * h < plan_.box_pixels;
  }

  // Zero in rows without a pixel; pixels[16 i + 8 h] are those of this lane's rows.
  __device__ void cut_data(const int* pixels) {
    bool exists[2 * C::m_tiles], all = true;
#pragma unroll
    for (int i = 0; i < 2 * C::m_tiles; ++i) {
      exists[i] = in_box(i / 2, i % 2) && pixels[8 * i] != kOutside;
      all &= exists[i] || tile_row(i / 2) >= plan_.box_pixels;  // which nobody looks at
    }
    if (__all_sync(~0u, all)) return;
#pragma unroll
    for (int i = 0; i < C::m_tiles * C::n_tiles * 4; ++i) {
      float& own = da_[i / (4 * C::n_tiles)][i / 4 % C::n_tiles][i % 4];
      own = exists[i / (4 * C::n_tiles) * 2 + i % 4 / 2] ? own : 0.0f;
    }
  }

  __device__ void share_data(float share) {
#pragma unroll
    for (int i = 0; i < C::m_tiles * C::n_tiles * 4; ++i) {
      da_[i / (4 * C::n_tiles)][i / 4 % C::n_tiles][i % 4] *= share;
    }
  }

  __device__ void store_dx(int buffer, int slot) {
    const int column = o_.own_x_column();
    if (column == kOutside) return;
    const Matrix<T> from = o_.dx(buffer);
    const int left = o_.channels - column, step = o_.bytes_of(f_.dx);
    const unsigned char* const to = o_.start_of(f_.dx, o_.first_channel + column);
    const bool whole = plan_.x_access == kChunk && left >= Chunk<T>::size;
    const int* const pixels = o_.x_pixels(slot);
    o_.for_x_rows(plan_.x_rows, [&](int first, int more) {
      const int p = pixels[first + more];
      if (p == kOutside) return;
      T* const own = reinterpret_cast<T*>(const_cast<unsigned char*>(bytes_behind(to, p, step)));
      const T* const row = from.at(first, column) + more * C::ld;
      if (whole) {
        *reinterpret_cast<Chunk<T>*>(own) = *reinterpret_cast<const Chunk<T>*>(row);
      } else {
        store_chunk(own, row, left, plan_.x_access);
      }
    });
  }

  // Over the lanes and warps that share channels, to row blockIdx.y of the partial sums, (splits, 2, in).
  __device__ void store_sums(float* partials) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < C::n_tiles; ++j) {
      const int c = column_ + 8 * j + 2 * t;
      add_rows(sums_[j], [&](int i, float sum) { o_.sums[(warp_m_ * 2 + i / 2) * C::sums_ld + c + i % 2] = sum; });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * C::channels; i += C::threads) {
      const int c = i % C::channels;
      if (c >= o_.channels) continue;
      float sum = 0;
#pragma unroll
      for (int m = 0; m < C::warps_m; ++m) sum += o_.sums[(2 * m + i / C::channels) * C::sums_ld + c];
      partials[(static_cast<int64_t>(blockIdx.y) * 2 + i / C::channels) * f_.shape.in + o_.first_channel + c] = sum;
    }
  }

  // To slice blockIdx.y of the partial sums, (splits, taps, out, in).
  __device__ void store_weight(const Pass& pass, float* partials) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, of_tap = pass.outputs / 8;
    const int64_t in = f_.shape.in, out = f_.shape.out;
    float* const slice = partials + blockIdx.y * (plan_.kernel.volume() * out * in) + o_.first_channel;
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
            if (c < o_.channels) to[c] = dweight_[i][j][2 * h + q];
          }
        }
      }
    }
  }

  const Backward& f_;
  const BackwardPlan& plan_;
  BackwardOperands<C> o_;
  int warp_m_, column_, pairs_;
  float da_[C::m_tiles][C::n_tiles][4];
  float sums_[C::n_tiles][4] = {};  // of two channels: of dz, then of dz (x - mean)
  float dweight_[C::row_tiles][C::n_tiles][4] = {};
};

template <class C>
__global__ void __launch_bounds__(C::threads)
    backward_kernel(Backward f, BackwardPlan plan, float* weight_partials, float* sum_partials) {
  DYN_SMEM(shared);
  BackwardBlock<C>(f, plan, shared).run(weight_partials, sum_partials);
}

}  // namespace fused_densenet
