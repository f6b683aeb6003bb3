// What a block of the backward kernel has in shared memory, and how it gets there.
#pragma once

#include "backward_plan.cuh"
#include "gradient.cuh"
#include "shifted_product.cuh"

namespace fused_densenet {

// Pointwise: for 1x1 convolutions only, whose products need no tables of rows and groups.
template <Arithmetic A_, int Pixels, int Channels, int WarpsM, int WarpsN, int RowTiles, bool AddsPasses,
          bool Pointwise>
struct BackwardConfig {
  static constexpr Arithmetic A = A_;
  static constexpr bool pointwise = Pointwise;
  using T = typename Product<A>::T;
  static constexpr int channels = Channels, warps_m = WarpsM, warps_n = WarpsN, row_tiles = RowTiles;
  static constexpr int threads = 32 * WarpsM * WarpsN;
  static constexpr int m_tiles = Pixels / (16 * WarpsM), n_tiles = Channels / (8 * WarpsN);
  static constexpr int ld = Channels + 8, sums_ld = Channels + 8;  // both sums of a channel in different banks
  static constexpr BackwardTile tile{sizeof(T), Pixels, Channels, WarpsM, 16 * WarpsM * RowTiles, AddsPasses};
  static_assert(!Pointwise || (sizeof(T) == 2 && !AddsPasses));
  static_assert(Channels % 16 == 0 && m_tiles * 16 * WarpsM == Pixels && n_tiles % 2 == 0);
};

// The chunks of 16 bytes that are a thread's own in rows that `1 << lanes` threads share: one column of every `step`-th
// row, kOutside where it has none. `turn` is where the first row is if rows lie in the order in which they are taken.
struct OwnChunks {
  int row, turn, step, column;

  template <class C>
  __device__ static OwnChunks of(int lanes, int chunks) {
    constexpr int block = sizeof(typename C::T) == 2 ? 8 : 4;
    const int chunk = threadIdx.x & ((1 << lanes) - 1), turn = static_cast<int>(threadIdx.x) >> lanes;
    return {row_of_turn<block>(turn, 1 << lanes), turn, C::threads >> lanes,
            chunk < chunks ? chunk * Chunk<typename C::T>::size : kOutside};
  }
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
  int *halo_pixels, *box_pixels;       // where a box's rows are in memory: two boxes' gradients, three boxes' x
  unsigned *halo_places, *box_places;  // where they are in a box, packed
  int* row_of;                         // the row of g under each pixel, before a tap's shift
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
    box_pixels = halo_pixels + 2 * plan.halo_pixels;
    halo_places = reinterpret_cast<unsigned*>(box_pixels + 3 * plan.x_rows);
    box_places = halo_places + plan.halo_pixels;
    row_of = reinterpret_cast<int*>(box_places + plan.x_rows);
    groups = reinterpret_cast<Group*>(row_of + C::tile.pixels);
  }

  __device__ Matrix<T> x(int buffer) const { return {x_data + buffer * plan.x_rows * C::ld, C::ld}; }
  __device__ Matrix<T> dx(int buffer) const {
    return {dx_data + (f.accumulate ? buffer * plan.x_rows * C::ld : 0), C::ld};
  }
  __device__ const int* gradient_pixels(int buffer) const { return halo_pixels + buffer * plan.halo_pixels; }
  __device__ const int* x_pixels(int slot) const { return box_pixels + slot * plan.x_rows; }

  static __device__ int chunks_of(int numbers) { return (numbers + kSize - 1) / kSize; }
  // Of x: the first row and the column, kOutside where a thread has none.
  static constexpr int kXLanes = C::channels / kSize, kXStep = C::threads / kXLanes;
  static_assert(kXStep % 8 == 0);
  __device__ int own_x_row() const { return static_cast<int>(threadIdx.x) / kXLanes; }
  __device__ int own_x_column() const {
    const int chunk = static_cast<int>(threadIdx.x) % kXLanes;
    return chunk < chunks_of(channels) ? chunk * kSize : kOutside;
  }
  // body(first, more) for this thread's rows first + more below `rows`. `more` is known to the compiler.
  template <class Body>
  __device__ __forceinline__ void for_x_rows(int rows, Body body) const {
    constexpr int turns = C::tile.pixels / kXStep;
    for (int first = own_x_row(); first < rows; first += turns * kXStep) {
#pragma unroll
      for (int i = 0; i < turns; ++i) {
        if (i == 0 || first + i * kXStep < rows) body(first, i * kXStep);
      }
    }
  }
  __device__ OwnChunks own_gradient(const Pass& pass) const {
    return OwnChunks::of<C>(plan.gradient_lanes, pass.outputs / kSize);
  }
  // Bytes of a chunk that exist, of `numbers` from its first on.
  static __device__ int valid_bytes(int numbers) { return clamp(numbers, 0, kSize) * static_cast<int>(sizeof(T)); }

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

  // Whether the gradient is more than what is stored: it owes something, or is that of an activation.
  __device__ bool owes() const { return f.grad.mean != nullptr; }
  __device__ bool needs_value() const { return owes() || plan.gradient_slope != 1; }

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

  // What is the same for every box: where its rows are in it.
  __device__ void locate_rows() {
    const Box &box = plan.box, &kernel = plan.kernel, &window = plan.window;
    const auto packed = [](const Box& at) {
      return static_cast<unsigned>(at.n | at.d << 7 | at.h << 15) | unsigned(at.w) << 23;
    };
    for (int p = threadIdx.x; p < C::tile.pixels; p += C::threads) {
      row_of[p] = p < box.volume() ? index_in(plan.halo, place_in(box, p)) : 0;
    }
    for (int i = threadIdx.x; i < plan.halo_pixels; i += C::threads) halo_places[i] = packed(place_in(plan.halo, i));
    for (int i = threadIdx.x; i < plan.x_rows; i += C::threads) {
      const Box in_window = place_in(window, i / box.volume()), at = place_in(box, i % box.volume());
      const bool windows = window.volume() > 1;  // of a run
      box_places[i] = windows ? packed({at.w, in_window.d, in_window.h, in_window.w})
                              : packed({at.n, at.d + kernel.d / 2, at.h + kernel.h / 2, at.w + kernel.w / 2});
    }
  }

  // The pixels of a box, window by window, and of its gradient with the halo, kOutside where there are none.
  __device__ void locate(const Box& first, int buffer, int slot) {
    const int halo = plan.halo_pixels, first_x = (halo + 31) & ~31;  // a warp has rows of one kind
    for (int i = threadIdx.x; i < first_x + plan.x_rows; i += C::threads) {
      const bool is_x = i >= first_x;
      if (!is_x && i >= halo) continue;
      const unsigned packed = is_x ? box_places[i - first_x] : halo_places[i];
      const Box in_box{int(packed & 127), int(packed >> 7 & 255), int(packed >> 15 & 255), int(packed >> 23)};
      Box at{first.n + in_box.n, first.d + in_box.d, first.h + in_box.h, first.w + in_box.w}, image = plan.image;
      if (plan.window_pixels > 1) {
        const Box &w = plan.window, window = place_in(plan.windows, first.w + (is_x ? in_box.n : in_box.w));
        if (is_x) {
          at = {window.n, window.d * w.d + in_box.d, window.h * w.h + in_box.h, window.w * w.w + in_box.w};
        } else {
          at = window;
          image = {image.n, image.d / w.d, image.h / w.h, image.w / w.w};
        }
      }
      const auto inside = [](int at, int size) { return static_cast<unsigned>(at) < static_cast<unsigned>(size); };
      const bool exists = inside(at.n, image.n) & inside(at.d, image.d) & inside(at.h, image.h) & inside(at.w, image.w);
      int* const to = is_x ? box_pixels + slot * plan.x_rows - first_x : halo_pixels + buffer * halo;
      to[i] = exists ? index_in(image, at) : kOutside;
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
    if (C::pointwise && (pass.groups & 1)) {
      for (int i = threadIdx.x; i < plan.halo_pixels; i += C::threads) {
        store_shared(g.at(i, 8 * pass.groups), make_uint4(0, 0, 0, 0));
      }
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

  // Bytes from one pixel to the next; the launch has made sure that they fit.
  static __device__ int bytes_of(const Pixels& pixels) { return static_cast<int>(pixels.ld * int64_t{sizeof(T)}); }
  static __device__ const unsigned char* start_of(const Pixels& pixels, int channel) {
    return static_cast<const unsigned char*>(pixels.data) + channel * int64_t{sizeof(T)};
  }

  __device__ void fetch_gradient(const Pass& pass, int buffer) {
    const OwnChunks own = own_gradient(pass);
    if (own.column == kOutside) return;
    const int first = pass.first_output + own.column, valid = valid_bytes(static_cast<int>(f.shape.out) - first);
    const int stored_step = bytes_of(f.grad.stored), value_step = bytes_of(f.grad.value);
    const unsigned char *const stored = start_of(f.grad.stored, first), *const value = start_of(f.grad.value, first);
    const bool more = needs_value();
    const auto byte_of = [](T* at) { return reinterpret_cast<unsigned char*>(at); };
    const int to_step = own.step * plan.pass_outputs * int{sizeof(T)}, rows = plan.halo_pixels;
    with_access(plan.gradient_access, [&](auto width) {
      constexpr int access = decltype(width)::value;
      unsigned char* to = byte_of(raw + own.turn * plan.pass_outputs + own.column);
      unsigned char* to_value = to + plan.raw_rows * plan.pass_outputs * int{sizeof(T)};
      const int* pixel = gradient_pixels(buffer) + own.row;
      for (int row = own.row; row < rows; row += own.step) {
        const int p = *pixel;
        if (p != kOutside) {
          copy_chunk<access>(to, bytes_behind(stored, p, stored_step), valid);
          if (more) copy_chunk<access>(to_value, bytes_behind(value, p, value_step), valid);
        }
        pixel += own.step, to += to_step, to_value += to_step;
      }
    });
  }

  // x and, where it is added to, the old dx; zeros for pixels that do not exist.
  __device__ void fetch_x(int buffer, int slot) {
    const int column = own_x_column();
    if (column == kOutside) return;
    const int x_step = bytes_of(f.x), dx_step = bytes_of(f.dx);
    const unsigned char* const from = start_of(f.x, first_channel + column);
    const unsigned char* const old = start_of(f.dx, first_channel + column);
    const Matrix<T> to = x(buffer), old_to = dx(buffer);
    const bool old_too = plan.data && f.accumulate;
    const int valid = valid_bytes(channels - column);
    const int* const pixels = x_pixels(slot);
    with_access(plan.x_access, [&](auto width) {
      const auto copy = [&](T* to, const unsigned char* from, int valid) {
        copy_chunk<decltype(width)::value>(reinterpret_cast<unsigned char*>(to), from, valid);
      };
      for_x_rows(plan.x_rows, [&](int first, int more) {
        const int p = pixels[first + more], bytes = p == kOutside ? 0 : valid;
        copy(to.at(first, column) + more * C::ld, bytes_behind(from, p, x_step), bytes);
        if (old_too) copy(old_to.at(first, column) + more * C::ld, bytes_behind(old, p, dx_step), bytes);
      });
    });
  }

  __device__ void transform_gradient(const Pass& pass, int buffer) {
    const OwnChunks own = own_gradient(pass);
    if (own.column == kOutside) return;
    if (owes()) {
      float mean[kSize], constant[kSize], slope[kSize];
      g_vectors.read(mean, 0, own.column);
      g_vectors.read(constant, 1, own.column);
      g_vectors.read(slope, 2, own.column);
      transform_rows<true>(own, buffer, [&](int i, float stored, float value) {
        return load_gradient(stored, value, mean[i], constant[i], slope[i]);
      });
    } else if (needs_value()) {
      const float slope = plan.gradient_slope;
      transform_rows<true>(own, buffer,
                           [&](int, float stored, float value) { return leaky_backward(stored, value, slope); });
    } else {
      transform_rows<false>(own, buffer, [](int, float stored, float) { return stored; });
    }
  }

  // form(number of the column, stored, value), for each column of the chunk.
  template <bool Value, class Form>
  __device__ __forceinline__ void transform_rows(const OwnChunks& own, int buffer, Form form) {
    const T* from = raw + own.turn * plan.pass_outputs + own.column;
    const int to_value = plan.raw_rows * plan.pass_outputs;
    const int* pixel = gradient_pixels(buffer) + own.row;
    const int rows = plan.halo_pixels, from_step = own.step * plan.pass_outputs;
    for (int row = own.row; row < rows; row += own.step) {
      T* const to = g.at(row, own.column);
      if (*pixel != kOutside) {
        float stored[kSize], value[kSize];
        as_floats(stored, *reinterpret_cast<const Chunk<T>*>(from));
        if constexpr (Value) {
          as_floats(value, *reinterpret_cast<const Chunk<T>*>(from + to_value));
#pragma unroll
          for (int i = 0; i < kSize; ++i) stored[i] = form(i, stored[i], value[i]);
        }
        store_shared(to, multiplied<C::A>(stored));
      } else {
        store_shared(to, make_uint4(0, 0, 0, 0));
      }
      pixel += own.step, from += from_step;
    }
  }

  // The activation, averaged over windows; zero where there is no gradient (without a halo, rows of g are pixels).
  __device__ void transform_x(int buffer, int slot) {
    const int window = plan.window_pixels, count = plan.box_pixels, column = own_x_column();
    const int* const pixels = window > 1 ? gradient_pixels(buffer) : x_pixels(slot);
    if (column == kOutside) return;
    const Affine<C::A> affine(x_vectors, column);
    const Matrix<T> from = x(buffer);
    with_activation(plan.slope, [&](auto activation) {
      for_x_rows(plan.rows, [&](int first, int more) {
        T* const to = a.at(first, column) + more * C::ld;
        if (first + more >= count || pixels[first + more] == kOutside) {
          store_shared(to, make_uint4(0, 0, 0, 0));
        } else if (window == 1) {
          store_shared(to, affine.activated(from.at(first, column) + more * C::ld, activation));
        } else {
          const float share = 1.0f / static_cast<float>(window);
          float mean[kSize] = {};
          for (int w = 0; w < window; ++w) {
            float z[kSize];
            as_floats(z, *reinterpret_cast<const Chunk<T>*>(from.at(w * count + first + more, column)));
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              const float a = activation(normalised(z[i], affine.mean[i], affine.scale[i], affine.shift[i]));
              mean[i] = fmaf(a, share, mean[i]);
            }
          }
          store_shared(to, multiplied<C::A>(mean));
        }
      });
    });
  }
};

}  // namespace fused_densenet
