// What a block of the backward kernel has in shared memory, and how it gets there.
#pragma once

#include "backward_plan.cuh"
#include "gradient.cuh"
#include "shifted_product.cuh"

namespace fused_densenet {

template <Arithmetic A_, int Pixels, int Channels, int WarpsM, int WarpsN, int RowTiles, bool AddsPasses>
struct BackwardConfig {
  static constexpr Arithmetic A = A_;
  using T = typename Product<A>::T;
  static constexpr int channels = Channels, warps_m = WarpsM, warps_n = WarpsN, row_tiles = RowTiles;
  static constexpr int threads = 32 * WarpsM * WarpsN;
  static constexpr int m_tiles = Pixels / (16 * WarpsM), n_tiles = Channels / (8 * WarpsN);
  static constexpr int ld = Channels + 8, sums_ld = Channels + 8;  // both sums of a channel in different banks
  static constexpr BackwardTile tile{sizeof(T), Pixels, Channels, WarpsM, 16 * WarpsM * RowTiles, AddsPasses};
  static_assert(Channels % 16 == 0 && m_tiles * 16 * WarpsM == Pixels && n_tiles % 2 == 0);
};

// The part of the (tap, output) rows that is in shared memory.
struct Pass {
  int first_output, outputs, first_tap, taps, groups;  // outputs: a multiple of eight
};

template <class C>
struct BackwardOperands {
  using T = typename C::T;
  static constexpr int kSize = Chunk<T>::size;

  const Backward& f;
  const BackwardPlan& plan;
  const int first_channel, channels;  // of x; what the block owns
  Matrix<T> weight, g, a;             // rows: channels of x; the box's gradient with halo; its pixels
  T *raw, *x_data, *dx_data;
  Vectors g_vectors;  // mean, constant, slope
  float* sums;        // (warps_m, 2, C::sums_ld), each entry one lane's
  NormVectors x_vectors;
  int *halo_pixels, *box_pixels;  // where a box's rows are in memory: two boxes' gradients, three boxes' x
  int* row_of;                    // the row of g under each pixel, before a tap's shift
  Group* groups;

  __device__ BackwardOperands(const Backward& f, const BackwardPlan& plan, unsigned char* shared)
      : f(f),
        plan(plan),
        first_channel(blockIdx.x * C::channels),
        channels(clamp(f.shape.in - first_channel, 0, C::channels)) {
    const auto at = [shared](int offset) { return reinterpret_cast<T*>(shared + offset); };
    weight = {at(plan.weight_at), plan.weight_ld};
    g = {at(plan.gradient_at), plan.gradient_ld};
    a = {at(plan.activation_at), C::ld};
    raw = at(plan.raw_at);
    x_data = at(plan.x_at);
    dx_data = at(plan.dx_at);
    g_vectors = {reinterpret_cast<float*>(shared + plan.vectors_at), plan.pass_outputs};
    x_vectors = {{g_vectors.data + 3 * plan.pass_outputs, C::channels}};
    sums = x_vectors.data + NormVectors::kCount * C::channels;
    halo_pixels = reinterpret_cast<int*>(shared + plan.tables_at);
    box_pixels = halo_pixels + 2 * plan.halo.volume();
    row_of = box_pixels + 3 * plan.x_rows();
    groups = reinterpret_cast<Group*>(row_of + C::tile.pixels);
  }

  __device__ Matrix<T> x(int buffer) const { return {x_data + buffer * plan.x_rows() * C::ld, C::ld}; }
  __device__ Matrix<T> dx(int buffer) const {
    return {dx_data + (f.accumulate ? buffer * plan.x_rows() * C::ld : 0), C::ld};
  }
  __device__ const int* gradient_pixels(int buffer) const { return halo_pixels + buffer * plan.halo.volume(); }
  __device__ const int* x_pixels(int slot) const { return box_pixels + slot * plan.x_rows(); }

  // Threads that share a row of `chunks` chunks of 16 bytes: whole quarters of a warp, or an equal part of one.
  static __device__ int lanes_of(int chunks) { return chunks > 4 ? (chunks + 7) & ~7 : chunks == 3 ? 4 : chunks; }

  // The column of the chunks that this thread takes, kOutside where it has none.
  static __device__ int own_column(int chunks) {
    const int lanes = lanes_of(chunks), chunk = threadIdx.x % lanes;
    return chunk < chunks && static_cast<int>(threadIdx.x) < C::threads / lanes * lanes ? chunk * kSize : kOutside;
  }

  // body(row, turn) for this thread's chunks: `turn` counts rows in the order in which they are taken.
  template <class Body>
  static __device__ void for_each_row(int rows, int chunks, Body body) {
    constexpr int block = sizeof(T) == 2 ? 8 : 4;
    const int lanes = lanes_of(chunks), step = C::threads / lanes;
    for (int turn = threadIdx.x / lanes; turn < rows + block - 1; turn += step) {
      const int row = row_of_turn<block>(turn, lanes);
      if (row < rows) body(row, turn);
    }
  }
  __device__ int x_chunks() const { return (channels + kSize - 1) / kSize; }

  __device__ Pass pass_of(int i) const {
    Pass p;
    const int taps = plan.kernel.volume(), outputs = (static_cast<int>(f.shape.out) + 7) / 8 * 8;
    p.first_tap = i % plan.tap_passes * plan.pass_taps;
    p.taps = min(taps - p.first_tap, plan.pass_taps);
    p.first_output = i / plan.tap_passes * plan.pass_outputs;
    p.outputs = min(outputs - p.first_output, plan.pass_outputs);
    p.groups = p.taps * (p.outputs / 8);
    return p;
  }

  // Whether the gradient is more than what is stored.
  __device__ bool owes() const { return f.grad.mean != nullptr; }

  __device__ void load_gradient_vectors(const Pass& pass) {
    if (!owes()) return;
    const void* const from[3] = {f.grad.mean, f.grad.constant, f.grad.slope};
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      for (int k = threadIdx.x; k < pass.outputs; k += C::threads) {
        const int output = pass.first_output + k;
        *g_vectors.at(v, k) = output < f.shape.out ? static_cast<const float*>(from[v])[output] : 0;
      }
    }
  }

  __device__ void locate_rows() {
    for (int p = threadIdx.x; p < C::tile.pixels; p += C::threads) {
      row_of[p] = p < plan.box.volume() ? index_in(plan.halo, place_in(plan.box, p)) : 0;
    }
  }

  // The pixels of a box, window by window, and of its gradient with the halo, kOutside where there are none.
  __device__ void locate(int tile, int buffer, int slot) {
    const Box &box = plan.box, &kernel = plan.kernel, &window = plan.window;
    const Box tile_at = place_in(plan.tiles, tile);
    const int halo_rows = plan.halo.volume(), first_x = (halo_rows + 31) / 32 * 32;  // a warp has rows of one kind
    for (int i = threadIdx.x; i < first_x + plan.x_rows(); i += C::threads) {
      const bool is_x = i >= first_x;
      if (!is_x && i >= halo_rows) continue;
      const int count = box.volume(), row = is_x ? (i - first_x) % count : i;
      Box at = place_in(is_x ? box : plan.halo, row), image = plan.image;
      at = {tile_at.n * box.n + at.n, tile_at.d * box.d + at.d - (is_x ? 0 : kernel.d / 2),
            tile_at.h * box.h + at.h - (is_x ? 0 : kernel.h / 2), tile_at.w * box.w + at.w - (is_x ? 0 : kernel.w / 2)};
      if (window.volume() > 1) {
        at = place_in(plan.windows, at.w);
        if (is_x) {
          const Box in_window = place_in(window, (i - first_x) / count);
          at = {at.n, at.d * window.d + in_window.d, at.h * window.h + in_window.h, at.w * window.w + in_window.w};
        } else {
          image = {image.n, image.d / window.d, image.h / window.h, image.w / window.w};
        }
      }
      const bool inside =
          at.n < image.n && at.d >= 0 && at.d < image.d && at.h >= 0 && at.h < image.h && at.w >= 0 && at.w < image.w;
      int* const table = is_x ? box_pixels + slot * plan.x_rows() - first_x : halo_pixels + buffer * halo_rows;
      table[i] = inside ? index_in(image, at) : kOutside;
    }
  }

  // The pass's groups and, for the data gradient, its weights: rows are channels of x, columns taps by outputs.
  __device__ void load_pass(const Pass& pass) {
    const int kw = plan.kernel.w, kh = plan.kernel.h, of_tap = pass.outputs / 8;
    for (int j = threadIdx.x; j < pass.groups + (pass.groups & 1); j += C::threads) {
      const int i = min(j, pass.groups - 1);  // the last step's second half may be its first again
      const Box tap = place_in(plan.kernel, pass.first_tap + i / of_tap);
      const Box shift{0, plan.kernel.d - 1 - tap.d, kh - 1 - tap.h, kw - 1 - tap.w};
      groups[j] = Group::of<T>(index_in(plan.halo, shift), i % of_tap * 8, g.ld);
    }
    if (!plan.data) return;
    // A thread keeps its channel of x and takes rows (k, tap), taps first: neighbours in memory whatever the layout.
    // Loads are issued in batches, because a store to shared memory keeps the next load behind it.
    constexpr int step = C::threads / C::channels, batch = 8;
    const Weight& w = f.weight;
    const int c = threadIdx.x % C::channels, rows = pass.taps * pass.outputs;
    const int64_t from_channel = (first_channel + c) * w.stride_in;
    int k = threadIdx.x / C::channels / pass.taps, tap = threadIdx.x / C::channels % pass.taps;
    for (int row = threadIdx.x / C::channels; row < rows; row += step * batch) {
      float values[batch];
      int columns[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int output = pass.first_output + k, t = pass.first_tap + tap;
        columns[i] = k < pass.outputs ? tap * pass.outputs + k : -1;
        values[i] = 0;
        if (c < channels && k < pass.outputs && output < f.shape.out) {
          const int64_t from = output * w.stride_out + from_channel + t / (kw * kh) * w.stride_tap[0] +
                               t / kw % kh * w.stride_tap[1] + t % kw * w.stride_tap[2];
          values[i] = w.is_float ? __ldg(static_cast<const float*>(w.data) + from)
                                 : as_float(__ldg(static_cast<const T*>(w.data) + from));
        }
        k += step / pass.taps, tap += step % pass.taps;
        if (tap >= pass.taps) tap -= pass.taps, ++k;
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        if (columns[i] >= 0) *weight.at(c, columns[i]) = Product<C::A>::number(values[i]);
      }
    }
    if (pass.groups & 1) {
      for (int i = threadIdx.x; i < C::channels * 8; i += C::threads) {
        *weight.at(i / 8, 8 * pass.groups + i % 8) = Product<C::A>::number(0);
      }
    }
  }

  __device__ void fetch_gradient(const Pass& pass, int buffer) {
    const int* const pixels = gradient_pixels(buffer);
    const Pixels &stored = f.grad.stored, &value = f.grad.value;
    const int outputs = static_cast<int>(f.shape.out) - pass.first_output, column = own_column(pass.outputs / kSize);
    if (column == kOutside) return;
    T* const raw_value = raw + plan.raw_rows() * plan.pass_outputs;
    for_each_row(plan.halo.volume(), pass.outputs / kSize, [&](int row, int turn) {
      const int64_t p = pixels[row];
      if (p == kOutside) return;
      const int to = turn * plan.pass_outputs + column, from = pass.first_output + column;
      copy_numbers(raw + to, static_cast<const T*>(stored.data) + p * stored.ld + from, outputs - column,
                   plan.stored_access);
      if (!owes()) return;
      copy_numbers(raw_value + to, static_cast<const T*>(value.data) + p * value.ld + from, outputs - column,
                   plan.value_access);
    });
  }

  // x and, where it is added to, the old dx.
  __device__ void fetch_x(int buffer, int slot) {
    const int* const pixels = x_pixels(slot);
    const Matrix<T> to = x(buffer), old_to = dx(buffer);
    const bool old_too = plan.data && f.accumulate;
    const int column = own_column(x_chunks());
    if (column == kOutside) return;
    for_each_row(plan.x_rows(), x_chunks(), [&](int row, int) {
      const int64_t p = pixels[row];
      if (p == kOutside) return;
      const int from = first_channel + column, count = channels - column;
      copy_numbers(to.at(row, column), static_cast<const T*>(f.x.data) + p * f.x.ld + from, count, plan.x_access);
      if (old_too) {
        copy_numbers(old_to.at(row, column), static_cast<const T*>(f.dx.data) + p * f.dx.ld + from, count,
                     plan.dx_access);
      }
    });
  }

  __device__ void transform_gradient(const Pass& pass, int buffer) {
    const int* const pixels = gradient_pixels(buffer);
    const int chunks = pass.outputs / kSize, column = own_column(chunks), ld = plan.pass_outputs;
    if (column == kOutside) return;
    float mean[kSize], constant[kSize], slope[kSize];
    const bool more = owes();
    if (more) {
      g_vectors.read(mean, 0, column);
      g_vectors.read(constant, 1, column);
      g_vectors.read(slope, 2, column);
    }
    for_each_row(plan.halo.volume(), chunks, [&](int row, int turn) {
      Chunk<T> out;
      const bool inside = pixels[row] != kOutside;
      const T* const from = raw + turn * ld + column;
      const Chunk<T> stored = *reinterpret_cast<const Chunk<T>*>(from);
      const Chunk<T> value = more ? *reinterpret_cast<const Chunk<T>*>(from + plan.raw_rows() * ld) : stored;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float d = as_float(stored.element[i]);
        const float loaded = more ? load_gradient(d, as_float(value.element[i]), mean[i], constant[i], slope[i]) : d;
        out.element[i] = Product<C::A>::number(inside ? loaded : 0.0f);
      }
      store_shared(g.at(row, column), __builtin_bit_cast(uint4, out));
    });
  }

  // The activation, averaged over windows; zero where there is no gradient (without a halo, rows of g are pixels).
  __device__ void transform_x(int buffer, int slot) {
    const int* const pixels = plan.kernel.volume() == 1 ? gradient_pixels(buffer) : x_pixels(slot);
    const int column = own_column(x_chunks()), window = plan.window.volume(), count = plan.box.volume();
    if (column == kOutside) return;
    const float share = 1.0f / static_cast<float>(window);
    const Affine<C::A> affine(x_vectors, column);
    const Matrix<T> from = x(buffer);
    for_each_row(plan.rows, x_chunks(), [&](int row, int) {
      uint4 out = make_uint4(0, 0, 0, 0);
      const bool exists = row < count && pixels[row] != kOutside;
      if (exists && window == 1) {
        out = affine.activated(from.at(row, column));
      } else if (exists) {
        float mean[kSize] = {};
        for (int w = 0; w < window; ++w) {
          const Chunk<T> in = *reinterpret_cast<const Chunk<T>*>(from.at(w * count + row, column));
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const float z = normalised(as_float(in.element[i]), affine.mean[i], affine.scale[i], affine.shift[i]);
            mean[i] = fmaf(relu(z), share, mean[i]);
          }
        }
        out = affine.rectified(mean);
      }
      store_shared(a.at(row, column), out);
    });
  }
};

}  // namespace fused_densenet
