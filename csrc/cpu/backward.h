// Backward: data gradient, weight gradient and both per-channel sums from one reading of gradient and activations.
//
// A box's gradient is loaded once. Then, a block of input channels at a time: the activations are recomputed, the
// weight gradient takes them, and the data gradient of the same channels is masked, summed and stored while their
// inputs are still in cache. Where forward pooled, a box is one of pooled pixels and each gradient goes to its window.

namespace fused_densenet::FD_ISA {

template <class T, class P>
class BackwardKernel {
  using A = Accumulate<T>;
  using E = typename P::Element;
  using V = Vec<A>;

 public:
  BackwardKernel(const Backward& f, void* workspace, int threads)
      : f_(f),
        arena_(workspace),
        norm_(f.norm, f.shape.in, arena_),
        packed_(f.shape, true, filtering_of<T, P>(f.shape)),
        windows_(f.shape),
        grad_blocks_(ceil_div(packed_.row_elements(), kBlock)),
        pixel_blocks_(ceil_div(f.shape.out, kBlock)),
        dweight_rows_(round_up(f.shape.out, kWhole)),
        ld_dweight_(round_up(f.shape.in, kWidth)) {
    const int64_t operands = grad_blocks_ + 1 + (P::pair == 2 ? pixel_blocks_ : 0);
    grid_ = plan_grid(f.shape, operands * kBlock * sizeof(E) + kBlock * sizeof(A), threads, packed_.filtering);
    parts_ = parts_of(grid_, threads);
    Arena& arena = arena_;
    weight_ = arena.take<E>(packed_.bytes() / sizeof(E));
    partial_ = arena.take<A>(norm_.given() ? 2 * grid_.count() * f.shape.in : 0);
    partial_dbias_ = arena.take<A>(needs_dbias() ? grid_.count() * f.shape.out : 0);
    dweight_size_ = needs_dweight() ? packed_.taps * dweight_rows_ * ld_dweight_ : 0;
    dweight_ = arena.take<A>(dweight_size_ * parts_);
    for_parts_ = arena.used();
    grad_ = arena.take<E>((grad_blocks_ * grid_.padded_pixels() + kWhole - 1) * kBlock);
    const int64_t pairs = kWhole > 1 ? grid_.box[0] * plane_pairs(grid_.box[1], grid_.box[2]) : grid_.pixels();
    grad_by_pixel_ = arena.take<E>(P::pair == 2 ? pixel_blocks_ * pairs * kBlock : 0);
    activation_size_ = (grid_.padded_pixels() + (kWhole > 1 ? 2 * kWhole : 0)) * kBlock;
    activation_ = arena.take<E>(activation_size_);
    result_ = arena.take<A>((result_pixels(grid_) + kWhole - 1) * kBlock);
    steps_ = arena.take<Step>(f.shape.taps() * grad_blocks_);
    if (packed_.filtering > 0) {
      with_filtering<T>(packed_.filtering, [&]<int m>() {
        const auto product = by_filtering<m>(kBlock);
        using WeightGradient = WinogradWeightGradient<P, m>;
        patches_ = arena.take<E>(most(product.patches_size(), WeightGradient::patches_size()));
        products_ = arena.take<A>(most(product.products_size(), WeightGradient::gradients_size()));
      });
    }
    first_pixels_ = arena.take<int64_t>(pools() ? grid_.pixels() : 0);
    row_steps_ = arena.take<Step>(grid_.box[0] * grid_.box[1]);
    part_bytes_ = arena.used() - for_parts_;
  }

  size_t workspace() const { return for_parts_ + part_bytes_ * parts_; }

  void run(const Parallel& parallel) const {
    norm_.make();
    packed_.template pack<T>(f_.shape, f_.weight, weight_, parallel);
    if (!f_.accumulate) clear_pixels_without_a_window(parallel);
    parallel_for(parallel, parts_, [&](int64_t part) {
      const TileRegisters registers;
      std::memset(dweight_ + part * dweight_size_, 0, static_cast<size_t>(dweight_size_) * sizeof(A));
      // Behind a box's last pixel: what is there meets gradients of zero.
      if (kWhole > 1) std::memset(of_part(activation_, part), 0, static_cast<size_t>(activation_size_) * sizeof(E));
      const Range boxes = split(grid_.count(), parts_, part);
      for (int64_t i = boxes.begin; i < boxes.end; ++i) box(i, boxes.end, part);
    });
    if (needs_dbias()) write_dbias<T>(partial_dbias_, grid_.count(), f_.shape.out, f_.dbias);
    if (norm_.given()) {
      settle(partial_, grid_.count(), f_.shape.in, norm_, f_.owed, f_.shape.pixels(), f_.accumulate, parallel);
    }
    if (!needs_dweight()) return;
    write_dweight<T>(f_.shape, packed_.filtering, f_.dweight, dweight_, parts_, dweight_rows_, ld_dweight_, parallel);
  }

 private:
  static constexpr int64_t kWidth = Layout<P, Reduce::pixels>::panel;

  bool needs_dweight() const { return f_.dweight.data != nullptr; }
  bool needs_dbias() const { return f_.dbias.data != nullptr; }
  bool pools() const { return windows_.count > 1; }

  template <class X>
  X* of_part(X* p, int64_t part) const {
    return reinterpret_cast<X*>(reinterpret_cast<char*>(p) + part * part_bytes_);
  }

  void box(int64_t i, int64_t end, int64_t part) const {
    const Box b = grid_.at(i);
    const int64_t width = grid_.padded_width(b.size[2]), height = b.size[1] + 2 * grid_.margin[1];
    const int64_t padded = (b.size[0] + 2 * grid_.margin[0]) * height * width;
    load_gradient(b, part, padded, width);
    if (needs_dbias()) sum_gradient(b, partial_dbias_ + i * f_.shape.out);
    if (pools()) windows_.first_pixels(b.begin[2], b.size[2], of_part(first_pixels_, part));
    for (int64_t c = 0; c < f_.shape.in; c += kBlock) {
      const int64_t channels = least(kBlock, f_.shape.in - c);
      Prefetch prefetch = next_operands(b, i, end, c);
      if (needs_dweight()) {
        with_activation<T>(f_.x, norm_, [&](const auto& activation) {
          if (pools()) {
            const int64_t* first_pixels = of_part(first_pixels_, part);
            load_activation(PooledActivation(activation, windows_, first_pixels, b.begin[2]), b, part, c, channels,
                            width);
          } else {
            load_activation(activation, b, part, c, channels, width);
          }
        });
        if (packed_.filtering > 0)
          weight_gradient_by_patches(b, part, c, channels, height * width * kBlock, prefetch);
        else
          weight_gradient(b, part, c, channels, height, width, prefetch);
      }
      if (packed_.filtering > 0)
        data_gradient_by_patches(b, part, c, channels, height * width * kBlock, padded * kBlock, prefetch);
      with_activation<T>(f_.x, norm_, [&](const auto& activation) {
        A* sums = partial_ + 2 * i * f_.shape.in + c;
        int64_t stored = 0;
        if (packed_.filtering == 0) {
          stored = from_registers(channels);
          data_gradient(activation, b, part, c, channels, height, width, padded, sums, prefetch);
        }
        store_data_gradient(activation, b, part, c, stored, channels, sums);
      });
    }
  }

  // Of a block's channels, those whose data gradients never lie in memory: whole tiles, of which each goes to one
  // pixel.
  int64_t from_registers(int64_t channels) const {
    return kWhole > 1 || pools() ? 0 : channels / packed_.width * packed_.width;
  }

  // A vector of channels' data gradients: masked, summed and stored, a pixel at a time.
  template <Form form>
  struct Masked {
    typename Activation<T, form>::Column of_channels;
    bool accumulate;
    V sum = V::zero(), sum_centered = V::zero();

    __attribute__((always_inline)) void store_pixel(V dz, int64_t pixel, T* dx, int lanes) {
      if constexpr (form != Form::no_norm) {
        const V centered = of_channels.centered(pixel, lanes);
        dz = of_channels.gradient(of_channels.before(centered), dz);
        sum += dz;
        sum_centered = fma(dz, centered, sum_centered);
      }
      store(dx, accumulate ? fma(of_channels.scale, dz, load(dx, lanes)) : of_channels.scale * dz, lanes);
    }
  };

  // Of a tile out of the registers (tile.h).
  template <Form form>
  struct FromRegisters {
    static constexpr bool whole = true;
    const Activation<T, form>& activation;
    const Backward& f;
    int64_t pixel, channel;
    A* sums;  // of these channels
    bool first;

    template <int rows, int vectors>
    void operator()(V (&acc)[rows][vectors]) const {
      T* dx = static_cast<T*>(f.dx.data) + pixel * f.dx.ld + channel;
      const int64_t ld = f.dx.ld, first_pixel = pixel;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        Masked<form> masked{activation.column(channel + v * V::size, V::size), f.accumulate};
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
          masked.store_pixel(acc[r][v], first_pixel + r, dx + r * ld + v * V::size, V::size);
        if constexpr (form == Form::no_norm) continue;
        A *to = sums + v * V::size, *to_centered = to + f.shape.in;
        store(to, first ? masked.sum : load(to) + masked.sum);
        store(to_centered, first ? masked.sum_centered : load(to_centered) + masked.sum_centered);
      }
    }
  };

  template <Form form>
  struct Finish {
    using To = FromRegisters<form>;
    const Activation<T, form>& activation;
    const Backward& f;
    int64_t pixel, channel, whole;  // of the first row and column; channels that are taken out of the registers
    A* sums;
    bool first;  // rows of a box

    bool takes(int64_t column) const { return column < whole; }
    To at(int64_t row, int64_t column) const {
      return {activation, f, pixel + row, channel + column, sums + column, first && row == 0};
    }
    void done(int64_t, int64_t, int64_t) const {}
  };

  template <Form form>
  void data_gradient(const Activation<T, form>& activation, const Box& b, int64_t part, int64_t c, int64_t channels,
                     int64_t height, int64_t width, int64_t padded, A* sums, Prefetch& prefetch) const {
    Step* steps = of_part(steps_, part);
    int64_t count = 0;
    for (int64_t tap = 0; tap < f_.shape.taps(); ++tap) {
      for (int64_t k = 0; k < grad_blocks_; ++k) {
        steps[count++] = {(k * padded + tap_pixel(f_.shape, tap, height, width)) * kBlock,
                          (tap * packed_.row_elements() + k * kBlock) * packed_.width,
                          least(kBlock, packed_.row_elements() - k * kBlock)};
      }
    }
    const Runs runs(grid_, b);
    for (int64_t d = 0; d < b.size[0]; ++d) {
      for (int64_t h = 0; h < runs.count; ++h) {
        const Finish<form> finish{activation,      f_, grid_.pixel(b, d, h, 0), c, from_registers(channels), sums,
                                  d == 0 && h == 0};
        A* result = of_part(result_, part) + (d * b.size[1] + h) * result_width(grid_, b) * kBlock;
        multiply<P, Reduce::channels>(of_part(grad_, part) + (d * height + h) * width * kBlock, kBlock,
                                      weight_ + c / packed_.width * packed_.panel_size(), packed_.panel_size(),
                                      Result<A>{result, kBlock, kBlock, packed_.width}, runs.pixels, channels, steps,
                                      count, false, prefetch, finish);
      }
    }
  }

  void data_gradient_by_patches(const Box& b, int64_t part, int64_t c, int64_t channels, int64_t plane_size,
                                int64_t block_size, Prefetch& prefetch) const {
    if constexpr (P::pair == 1) {
      with_filtering<T>(packed_.filtering, [&]<int m>() {
        const TilePlane<m> plane{b.size[1], b.size[2]};
        for (int64_t d = 0; d < b.size[0]; ++d) {
          by_filtering<m>(channels).run(plane, padded_plane(plane, of_part(grad_, part) + d * plane_size, block_size),
                                        weight_ + c / packed_.width * packed_.panel_size(), packed_.panel_size(),
                                        of_part(result_, part) + d * b.size[1] * b.size[2] * kBlock, kBlock,
                                        of_part(patches_, part), of_part(products_, part), prefetch);
        }
      });
    }
  }

  template <int m>
  WinogradProduct<P, m> by_filtering(int64_t channels) const {
    return {f_.shape.out, channels};
  }

  // What the next block of channels reads, or the next box's first.
  Prefetch next_operands(const Box& b, int64_t i, int64_t end, int64_t c) const {
    Prefetch prefetch;
    int64_t next = c + kBlock, from = grid_.pixel(b, 0, 0, 0);
    int64_t pixels = b.size[0] * b.size[1] * b.size[2];
    if (next >= f_.shape.in) {
      if (i + 1 == end) return prefetch;
      next = 0;
      from = grid_.pixel(grid_.at(i + 1), 0, 0, 0);
      const Pixels &stored = f_.grad.stored, &value = f_.grad.value;
      const int64_t bytes = f_.shape.out * sizeof(T);
      prefetch.add(static_cast<const T*>(stored.data) + from * stored.ld, pixels, bytes, stored.ld * sizeof(T));
      prefetch.add(static_cast<const T*>(value.data) + from * value.ld, pixels, bytes, value.ld * sizeof(T));
    }
    if (pools()) from = windows_.first_pixel(from);
    pixels *= windows_.count;
    const int64_t bytes = least(kBlock, f_.shape.in - next) * sizeof(T);
    prefetch.add(static_cast<const T*>(f_.x.data) + from * f_.x.ld + next, pixels, bytes, f_.x.ld * sizeof(T));
    prefetch.add(static_cast<const T*>(f_.dx.data) + from * f_.dx.ld + next, pixels, bytes, f_.dx.ld * sizeof(T));
    const int64_t pixels_of_gradient = b.size[0] * b.size[1] * row_elements(b);
    int64_t work = b.size[0] * b.size[1] * tiles_of<P, Reduce::channels>(b.size[2], kBlock) * packed_.taps *
                   packed_.row_elements();
    int64_t pixels_of_tile = 1;
    if (packed_.filtering > 0) {
      with_filtering<T>(packed_.filtering, [&]<int m>() {
        work = b.size[0] * by_filtering<m>(kBlock).work({b.size[1], b.size[2]});
        pixels_of_tile = m * m;
      });
    }
    if (needs_dweight()) {
      work += packed_.taps * tiles_of<P, Reduce::pixels>(f_.shape.out, kBlock) * pixels_of_gradient / pixels_of_tile;
    }
    prefetch.spread(work);
    return prefetch;
  }

  void load_gradient(const Box& b, int64_t part, int64_t padded, int64_t width) const {
    const LoadedGradient<T> gradient(f_.grad);
    using Loader = Fill<P, LoadedGradient<T>>;
    constexpr int64_t block_channels = kBlock * P::pair;
    for_each_row(grid_, b, true, [&](int64_t row, int64_t first, int64_t low, int64_t high) {
      for (int64_t k = 0; k < grad_blocks_; ++k) {
        const int64_t n = k * block_channels;
        Loader::by_channel(gradient, first, low, high, width, n, least(block_channels, f_.shape.out - n),
                           of_part(grad_, part) + (k * padded + row * width) * kBlock);
      }
    });
#if defined(FD_AMX)
    if (!needs_dweight()) return;
    const int64_t pairs = plane_pairs(b.size[1], b.size[2]);
    for (int64_t n = 0; n < f_.shape.out; n += kWhole) {
      for (int64_t d = 0; d < b.size[0]; ++d) {
        Loader::transposed_pairs(gradient, grid_.pixel(b, d, 0, 0), grid_.image[2], b.size[1], b.size[2], width, pairs,
                                 n, static_cast<int>(least(kWhole, f_.shape.out - n)),
                                 of_part(grad_by_pixel_, part) + (n * b.size[0] + d * kWhole) * pairs);
      }
    }
#else
    if constexpr (P::pair == 2) {
      if (!needs_dweight()) return;
      const int64_t pixels = grid_.pixels();
      for_each_row(grid_, b, false, [&](int64_t row, int64_t first, int64_t, int64_t) {
        for (int64_t k = 0; k < pixel_blocks_; ++k) {
          const int64_t n = k * kBlock;
          Loader::pairs_of_pixels(gradient, first, b.size[2], n, least(kBlock, f_.shape.out - n),
                                  of_part(grad_by_pixel_, part) + (k * pixels + row * row_elements(b)) * kBlock);
        }
      });
    }
#endif
  }

  // Of a box without its margin, which its neighbours sum.
  void sum_gradient(const Box& b, A* sums) const {
    const LoadedGradient<T> gradient(f_.grad);
    for (int64_t c = 0; c < f_.shape.out; c += V::size) {
      const int n = static_cast<int>(least(V::size, f_.shape.out - c));
      V sum = V::zero();
      const auto column = gradient.column(c, n);
      for_each_row(grid_, b, false, [&](int64_t, int64_t first, int64_t, int64_t) {
        for (int64_t w = 0; w < b.size[2]; ++w) sum += column.at(first + w, n);
      });
      store(sums + c, sum, n);
    }
  }

  int64_t row_elements(const Box& b) const { return ceil_div(b.size[2], P::pair); }

  // Of a plane with the margins between its rows.
  int64_t plane_pairs(int64_t height, int64_t width) const {
    return round_up(ceil_div((height - 1) * grid_.padded_width(width) + width, 2), kWhole);
  }

  template <class S>
  void load_activation(const S& source, const Box& b, int64_t part, int64_t c, int64_t channels, int64_t width) const {
    for_each_row(grid_, b, true, [&](int64_t row, int64_t first, int64_t low, int64_t high) {
      Fill<P, S>::by_pixel(source, first, low, high, width, c, channels,
                           of_part(activation_, part) + row * width * kBlock);
    });
  }

  void weight_gradient_by_patches(const Box& b, int64_t part, int64_t c, int64_t channels, int64_t plane_size,
                                  Prefetch& prefetch) const {
    if constexpr (P::pair == 1) {
      with_filtering<T>(packed_.filtering, [&]<int m>() {
        const TilePlane<m> plane{b.size[1], b.size[2]};
        const int64_t block_size = (b.size[0] + 2 * grid_.margin[0]) * plane_size;
        const WinogradWeightGradient<P, m> product{channels, f_.shape.out, dweight_rows_, ld_dweight_};
        for (int64_t d = 0; d < b.size[0]; ++d) {
          product.run(plane, padded_plane(plane, of_part(activation_, part) + d * plane_size, 0),
                      plane_inside(plane, of_part(grad_, part) + d * plane_size, block_size),
                      dweight_ + part * dweight_size_ + c, of_part(patches_, part), of_part(products_, part), prefetch);
        }
      });
    }
  }

  void weight_gradient(const Box& b, int64_t part, int64_t c, int64_t channels, int64_t height, int64_t width,
                       Prefetch& prefetch) const {
    const Runs runs(grid_, b);
    const int64_t run_elements = kWhole > 1 ? plane_pairs(b.size[1], b.size[2]) : row_elements(b);
    const bool with_margin = P::pair == 1;  // the gradient as it lies
    const int64_t gradient_rows = with_margin ? (b.size[0] + 2 * grid_.margin[0]) * height * width
                                              : (kWhole > 1 ? b.size[0] * run_elements : grid_.pixels());
    const E* gradient =
        with_margin ? of_part(grad_, part) + margin_pixels(height, width) * kBlock : of_part(grad_by_pixel_, part);
    Step* steps = of_part(row_steps_, part);
    int64_t count = 0;
    for (int64_t d = 0; d < b.size[0]; ++d) {
      for (int64_t h = 0; h < runs.count; ++h, ++count) {
        const int64_t padded = (d * height + h) * width * kBlock;
        const int64_t a = with_margin ? padded : count * run_elements * (kWhole > 1 ? kWhole : kBlock);
        steps[count] = {a, padded, run_elements};
      }
    }
    A* dweight = dweight_ + part * dweight_size_;
    for (int64_t tap = 0; tap < f_.shape.taps(); ++tap) {
      const E* activation = of_part(activation_, part) + tap_pixel(f_.shape, tap, height, width) * kBlock;
      for (int64_t k = 0; k < pixel_blocks_; ++k) {
        multiply<P, Reduce::pixels>(gradient + k * gradient_rows * kBlock, kWhole > 1 ? gradient_rows : 1, activation,
                                    kWidth, dweight + (tap * dweight_rows_ + k * kBlock) * ld_dweight_ + c, ld_dweight_,
                                    least(kBlock, f_.shape.out - k * kBlock), channels, steps, count, true, prefetch);
      }
    }
  }

  int64_t margin_pixels(int64_t height, int64_t width) const {
    return (grid_.margin[0] * height + grid_.margin[1]) * width + grid_.margin[2];
  }

  // Calls f(pixels), which calls its own function with pixel and row, for every pixel of x that a row of a box's data
  // gradients goes back to: once for all neighbours, so that what f keeps meanwhile stays in registers.
  template <class F>
  void for_each_pixel(const Box& b, int64_t part, F f) const {
    if (pools()) {
      const int64_t* first_pixels = of_part(first_pixels_, part);
      return f([&, rows = b.size[2]](auto one) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t i = 0; i < windows_.count; ++i) one(first_pixels[row] + windows_.offset[i], row);
        }
      });
    }
    const int64_t width = b.size[2], ld = result_width(grid_, b);
    const bool whole_rows = width == grid_.image[2] && width == ld;
    const int64_t together = !whole_rows ? 1 : b.size[1] == grid_.image[1] ? b.size[0] * b.size[1] : b.size[1];
    for (int64_t row = 0; row < b.size[0] * b.size[1]; row += together) {
      const int64_t first = grid_.pixel(b, row / b.size[1], row % b.size[1], 0);
      f([=](auto one) {
        for (int64_t i = 0; i < together * width; ++i) one(first + i, row * ld + i);
      });
    }
  }

  // Those of a block's `channels` from `begin` on that lie in memory.
  template <Form form>
  void store_data_gradient(const Activation<T, form>& activation, const Box& b, int64_t part, int64_t c, int64_t begin,
                           int64_t channels, A* sums) const {
    constexpr int together = kSmallTiles ? 2 : kTogether;  // fewer where there are half as many registers
    int64_t j = begin;
    for (; j + together * V::size <= channels; j += together * V::size) {
      store_vectors<together, true>(activation, b, part, c, j, V::size, sums);
    }
    for (; j + V::size <= channels; j += V::size) store_vectors<1, true>(activation, b, part, c, j, V::size, sums);
    if (j < channels) store_vectors<1, false>(activation, b, part, c, j, static_cast<int>(channels - j), sums);
  }

  // `lanes` of a vector that is not `whole`.
  template <int vectors, bool whole, Form form>
  void store_vectors(const Activation<T, form>& activation, const Box& b, int64_t part, int64_t c, int64_t j, int lanes,
                     A* sums) const {
    const int n = whole ? V::size : lanes;
    Masked<form> masked[vectors];
    for (int v = 0; v < vectors; ++v) masked[v] = {activation.column(c + j + v * V::size, n), f_.accumulate};
    for_each_pixel(b, part, [&](auto pixels) {
      Masked<form> here[vectors];
      for (int v = 0; v < vectors; ++v) here[v] = masked[v];
      const A* const from = of_part(result_, part) + j;
      T* const dx = static_cast<T*>(f_.dx.data) + c + j;
      const int64_t ld = f_.dx.ld;
      const V share = V::all(A(1) / static_cast<A>(windows_.count));
      pixels([=, &here](int64_t pixel, int64_t row) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          here[v].store_pixel(load(from + row * kBlock + v * V::size) * share, pixel, dx + pixel * ld + v * V::size, n);
        }
      });
      for (int v = 0; v < vectors; ++v) {
        masked[v].sum = here[v].sum;
        masked[v].sum_centered = here[v].sum_centered;
      }
    });
    if constexpr (form == Form::no_norm) return;
    for (int v = 0; v < vectors; ++v) {
      A* to = sums + j + v * V::size;
      store(to, masked[v].sum, n);
      store(to + f_.shape.in, masked[v].sum_centered, n);
    }
  }

  // The last pixels of odd sizes that were pooled.
  void clear_pixels_without_a_window(const Parallel& parallel) const {
    const Shape& s = f_.shape;
    const int64_t size[3] = {s.d / s.window_d * s.window_d, s.h / s.window_h * s.window_h,
                             s.w / s.window_w * s.window_w};
    if (size[0] == s.d && size[1] == s.h && size[2] == s.w) return;
    parallel_for(parallel, s.n * s.d * s.h, [&](int64_t row) {
      const bool inside = row / s.h % s.d < size[0] && row % s.h < size[1];
      for (int64_t w = inside ? size[2] : 0; w < s.w; ++w) {
        std::memset(static_cast<T*>(f_.dx.data) + (row * s.w + w) * f_.dx.ld, 0, static_cast<size_t>(s.in) * sizeof(T));
      }
    });
  }

  const Backward& f_;
  Arena arena_;
  NormVectors<T> norm_;
  PackedWeight<P> packed_;
  Windows windows_;
  int64_t grad_blocks_, pixel_blocks_, dweight_rows_, ld_dweight_, dweight_size_, activation_size_, parts_;
  Grid grid_;
  E *weight_, *grad_, *grad_by_pixel_, *activation_, *patches_ = nullptr;
  A *partial_, *partial_dbias_, *dweight_, *result_, *products_ = nullptr;
  Step *steps_, *row_steps_;
  int64_t* first_pixels_;
  size_t for_parts_, part_bytes_;
};

}  // namespace fused_densenet::FD_ISA
