// Forward: out = conv(leaky(norm(x)), W), perhaps a bias and an activation, and the moments of out.
//
// A box's activations are computed once into scratch memory (zeros outside the image), all taps read them there. A
// kernel of size 1 may pool: then a box is one of pooled pixels, and windows are averaged on the way to scratch memory.

namespace fused_densenet::FD_ISA {

template <class T, class P>
class ForwardKernel {
  using A = Accumulate<T>;
  using E = typename P::Element;

 public:
  // `strided` is f, or null where that is none.
  ForwardKernel(const Forward& f, void* workspace, int threads, const StridedConv* strided = nullptr)
      : f_(f),
        strided_(strided),
        arena_(workspace),
        norm_(f.norm, f.shape.in, arena_),
        packed_(packed(f)),
        windows_(f.shape),
        blocks_(ceil_div(packed_.row_elements(), kBlock)),
        chunk_(f.shape.taps() == 1 ? least(blocks_, kChunk) : blocks_),
        ldc_(packed_.panels() * packed_.width) {
    const int64_t bytes_per_pixel = chunk_ * kBlock * sizeof(E) + ldc_ * sizeof(A) / 2;
    const bool pointwise = f.shape.taps() == 1;
    grid_ = plan_grid(f.shape, bytes_per_pixel, threads, packed_.filtering,
                      pointwise ? longest_read(f.shape.in * f.shape.window() * int64_t{sizeof(T)}) : kLongest);
    parts_ = parts_of(grid_, threads);
    Arena& arena = arena_;
    weight_ = f.weight.packed ? static_cast<E*>(f.weight.data) : arena.take<E>(packed_.bytes() / sizeof(E));
    partial_ = arena.take<A>(f.moments.mean == nullptr ? 0 : 2 * grid_.count() * f.shape.out);
    next_boxes_ = arena.take<int64_t>(parts_ * kApart);
    bias_ = arena.take<A>(finishes() ? f.shape.out : 0);
    for_parts_ = arena.used();
    const int64_t panel = least(chunk_ * kBlock, packed_.row_elements()) * packed_.width * int64_t{sizeof(E)};
    const int64_t strip_rows = strip_bytes(panel) / (chunk_ * kBlockBytes);
    strip_ = pointwise ? most(strip_rows / kTileRows, 1) * kTileRows : grid_.box[2];
    const int64_t loaded = reads_image() ? 0 : chunk_ * (pointwise ? strip_ : grid_.padded_pixels()) + kWhole - 1;
    operand_ = arena.take<E>(loaded * kBlock);
    result_ = arena.take<A>(packed_.filtering > 0 ? grid_.box[1] * grid_.box[2] * ldc_
                            : chunk_ < blocks_    ? strip_ * ldc_
                                                  : kTileRows * packed_.width);
    rest_ = arena.take<A>(ldc_);
    seen_ = arena.take<int64_t>(ceil_div(f.shape.out, Output<T>::columns));
    first_pixels_ = arena.take<int64_t>(pools() ? grid_.pixels() : 0);
    steps_ = arena.take<Step>(f.shape.taps() * blocks_);
    if (packed_.filtering > 0) {
      with_filtering<T>(packed_.filtering, [&]<int m>() {
        const auto product = by_filtering<m>();
        patches_ = arena.take<E>(product.patches_size());
        products_ = arena.take<A>(product.products_size());
      });
    }
    part_bytes_ = arena.used() - for_parts_;
  }

  size_t workspace() const { return for_parts_ + part_bytes_ * parts_; }

  void run(const Parallel& parallel) const {
    norm_.make();
    if (finishes()) read_bias<T>(f_.bias, f_.shape.out, bias_);
    if (!f_.weight.packed) packed_.template pack<T>(f_.shape, f_.weight, weight_, parallel);
    for (int64_t part = 0; part < parts_; ++part) *next_box(part) = split(grid_.count(), parts_, part).begin;
    parallel_for(parallel, parts_, [&](int64_t part) {
      const TileRegisters registers;
      for (int64_t i = 0; i < parts_; ++i) {
        const int64_t of = (part + i) % parts_, end = split(grid_.count(), parts_, of).end;
        for (int64_t b = take_box(of); b < end; b = take_box(of)) box(b, end, part);
      }
      fence();
    });
    if (f_.moments.mean != nullptr) {
      merge_moments(
          partial_, grid_.count(), f_.shape.out,
          [&](int64_t i) {
            const Box b = grid_.at(i);
            return b.size[0] * b.size[1] * b.size[2];
          },
          f_.moments, parallel);
    }
  }

  static constexpr Packing packing() {
    return {
        [](const Forward& f) { return static_cast<int>(packed(f).filtering); },
        [](const Forward& f) { return static_cast<size_t>(packed(f).bytes()); },
        [](const Forward& f, void* out, const Parallel& parallel) {
          packed(f).template pack<T>(f.shape, f.weight, static_cast<E*>(out), parallel);
        },
    };
  }

 private:
  static PackedWeight<P> packed(const Forward& f) { return {f.shape, false, filtering_of<T, P>(f.shape)}; }
  template <int m>
  WinogradProduct<P, m> by_filtering() const {
    return {f_.shape.in, f_.shape.out};
  }

  static constexpr int64_t kBlockBytes = kBlock * sizeof(E);
  // Blocks of channels of a 1x1 convolution that are multiplied at once: a tile of their activations stays in the
  // first-level cache. (AMX's registers keep their sums over all.)
  static constexpr int64_t kChunk = kWhole > 1 ? int64_t{1} << 30 : most(kStripBytes / (kTileRows * kBlockBytes), 1);

  int64_t numbers_read() const {
    const Shape& s = f_.shape;
    return strided_ == nullptr ? s.pixels() * s.in
                               : s.n * strided_->size[0] * strided_->size[1] * strided_->size[2] * f_.x.ld;
  }
  bool pools() const { return windows_.count > 1; }
  bool finishes() const { return f_.bias.data != nullptr || f_.negative_slope != 1; }

  // A part takes its own boxes, neighbours in every layer, and then those that another has not yet come to.
  static constexpr int64_t kApart = 8;  // counters of two parts share no line of the cache
  int64_t* next_box(int64_t part) const { return next_boxes_ + part * kApart; }
  int64_t take_box(int64_t part) const { return __atomic_fetch_add(next_box(part), 1, __ATOMIC_RELAXED); }

  template <class X>
  X* of_part(X* p, int64_t part) const {
    return reinterpret_cast<X*>(reinterpret_cast<char*>(p) + part * part_bytes_);
  }

  void box(int64_t i, int64_t end, int64_t part) const {
    const Box b = grid_.at(i);
    Prefetch prefetch;
    const auto fetch = [&](int64_t pixel, int64_t count) {
      prefetch.add(static_cast<const T*>(f_.x.data) + (pools() ? windows_.first_pixel(pixel) : pixel) * f_.x.ld,
                   count * windows_.count, f_.shape.in * sizeof(T), f_.x.ld * sizeof(T));
    };
    if (strided_ == nullptr) {
      const bool first = i == split(grid_.count(), parts_, part).begin;
      if (first && strip_ < b.size[2]) fetch(grid_.pixel(b, 0, 0, strip_), b.size[2] - strip_);  // no box before it did
      if (i + 1 < end) fetch(grid_.pixel(grid_.at(i + 1), 0, 0, 0), b.size[0] * b.size[1] * b.size[2]);
    }
    const bool wanted = f_.moments.mean != nullptr;
    A* mean = wanted ? partial_ + 2 * i * f_.shape.out : nullptr;
    Output<T> output(
        static_cast<T*>(f_.out.data), f_.out.ld, f_.shape.out, mean, wanted ? mean + f_.shape.out : nullptr,
        of_part(rest_, part), of_part(seen_, part), {finishes() ? bias_ : nullptr, static_cast<A>(f_.negative_slope)},
        Output<T>::streams(f_.out, f_.shape.out_pixels() * f_.shape.out / parts_, numbers_read() / parts_));
    prefetch.spread(work(b));
    if (pools()) windows_.first_pixels(b.begin[2], b.size[2], of_part(first_pixels_, part));
    const int64_t strips = ceil_div(b.size[2], strip_);
    for (int64_t s = 0; s < strips; ++s) {
      const Range range = split(ceil_div(b.size[2], grid_.unit[2]), strips, s);
      Box strip = b;
      strip.begin[2] += range.begin * grid_.unit[2];
      strip.size[2] = least(range.end * grid_.unit[2], b.size[2]) - range.begin * grid_.unit[2];
      for (int64_t k = 0; k < blocks_; k += chunk_) {
        convolve(strip, b.begin[2], {k, least(blocks_, k + chunk_)}, part, output, prefetch);
      }
    }
  }

  // What the blocks of channels in `blocks` add to a box; its last ones store it.
  void convolve(const Box& b, int64_t begin, Range blocks, int64_t part, const Output<T>& output,
                Prefetch& prefetch) const {
    const int64_t width = grid_.padded_width(b.size[2]), height = b.size[1] + 2 * grid_.margin[1];
    const int64_t block_size = (b.size[0] + 2 * grid_.margin[0]) * height * width * kBlock;
    if (reads_image()) return by_patches(b, part, 0, 0, output, prefetch);
    if (strided_ != nullptr) {
      Im2col<T, P>(*strided_).load(b.begin[2], b.size[2], blocks, packed_.row_elements(), of_part(operand_, part),
                                   block_size);
      return tap_by_tap(b, blocks, part, height, width, block_size, output, prefetch);
    }
    with_activation<T>(f_.x, norm_, [&](const auto& activation) {
      if (pools()) {
        const int64_t* first_pixels = of_part(first_pixels_, part);
        load_operand(PooledActivation(activation, windows_, first_pixels, begin), b, blocks, part, width, block_size);
      } else {
        load_operand(activation, b, blocks, part, width, block_size);
      }
    });
    if (packed_.filtering > 0)
      by_patches(b, part, height * width * kBlock, block_size, output, prefetch);
    else
      tap_by_tap(b, blocks, part, height, width, block_size, output, prefetch);
  }

  int64_t work(const Box& b) const {
    if (packed_.filtering > 0) {
      int64_t plane = 0;
      with_filtering<T>(packed_.filtering, [&]<int m>() { plane = by_filtering<m>().work({b.size[1], b.size[2]}); });
      return b.size[0] * plane;
    }
    const Runs runs(grid_, b);
    return b.size[0] * runs.count * tiles_of<P, Reduce::channels>(runs.pixels, f_.shape.out) * packed_.taps *
           packed_.row_elements();
  }

  template <class S>
  void load_operand(const S& source, const Box& b, Range blocks, int64_t part, int64_t width,
                    int64_t block_size) const {
    E* operand = of_part(operand_, part);
    constexpr int64_t block_channels = kBlock * P::pair;
    for_each_row(grid_, b, true, [&](int64_t row, int64_t first, int64_t low, int64_t high) {
      for (int64_t k = blocks.begin; k < blocks.end; ++k) {
        const int64_t c = k * block_channels;
        Fill<P, S>::by_channel(source, first, low, high, width, c, least(block_channels, f_.shape.in - c),
                               operand + (k - blocks.begin) * block_size + row * width * kBlock);
      }
    });
  }

  // Where a run's tiles go: out of the registers, or, where they are no whole tiles of one row of pixels, from memory.
  struct Finish {
    using To = typename Output<T>::FromRegisters;
    const Output<T>& output;
    const Runs& runs;
    Result<A> result;
    int64_t first;  // of its pixels
    bool last;

    bool takes(int64_t column) const { return last && output.takes_registers(column); }
    To at(int64_t row, int64_t column) const { return {output, first + row, column}; }
    void done(int64_t row, int64_t rows, int64_t column) const {
      if (!last) return;
      runs.pieces(row, rows, [&](int64_t skipped, int64_t pixel, int64_t count) {
        output.store_rows(result.at(row, column / Output<T>::columns) + skipped * result.ld, result.ld, first + pixel,
                          count, column);
      });
    }
  };

  void tap_by_tap(const Box& b, Range blocks, int64_t part, int64_t height, int64_t width, int64_t block_size,
                  const Output<T>& output, Prefetch& prefetch) const {
    const E* operand = of_part(operand_, part);
    const bool in_chunks = chunk_ < blocks_;
    const int64_t panel = in_chunks ? strip_ * packed_.width : 0;
    const Result<A> result{of_part(result_, part), packed_.width, in_chunks ? packed_.width : 0, panel};
    Step* steps = of_part(steps_, part);
    int64_t count = 0;
    for (int64_t tap = 0; tap < f_.shape.taps(); ++tap) {
      for (int64_t k = blocks.begin; k < blocks.end; ++k) {
        steps[count++] = {(k - blocks.begin) * block_size + tap_pixel(f_.shape, tap, height, width) * kBlock,
                          (tap * packed_.row_elements() + k * kBlock) * packed_.width,
                          least(kBlock, packed_.row_elements() - k * kBlock)};
      }
    }
    const Runs runs(grid_, b);
    for (int64_t d = 0; d < b.size[0]; ++d) {
      for (int64_t h = 0; h < runs.count; ++h) {
        const Finish finish{output, runs, result, grid_.pixel(b, d, h, 0), blocks.end == blocks_};
        multiply<P, Reduce::channels>(operand + (d * height + h) * width * kBlock, kBlock, weight_,
                                      packed_.panel_size(), result, runs.pixels, f_.shape.out, steps, count,
                                      blocks.begin > 0, prefetch, finish);
      }
    }
  }

  // Whether patches are taken of x itself: there is nothing to compute, and no vector reaches beyond a pixel.
  bool reads_image() const {
    return packed_.filtering > 0 && sizeof(T) == sizeof(A) && !norm_.given() && f_.shape.in % Vec<A>::size == 0;
  }
  PixelPlane<A> image_plane(const Box& b, int64_t d) const {
    const int64_t ld = f_.x.ld, height = grid_.image[1], width = grid_.image[2];
    return {static_cast<const A*>(f_.x.data) + grid_.pixel(b, d, -1, -1) * ld,
            ld,
            width * ld,
            kBlock,
            most(0, 1 - b.begin[1]),
            least(b.size[1] + 2, height + 1 - b.begin[1]),
            most(0, 1 - b.begin[2]),
            least(b.size[2] + 2, width + 1 - b.begin[2])};
  }

  void by_patches(const Box& b, int64_t part, int64_t plane_size, int64_t block_size, const Output<T>& output,
                  Prefetch& prefetch) const {
    if constexpr (P::pair == 1) {
      with_filtering<T>(packed_.filtering, [&]<int m>() {
        const TilePlane<m> plane{b.size[1], b.size[2]};
        for (int64_t d = 0; d < b.size[0]; ++d) {
          const auto pixels = [&] {
            if constexpr (sizeof(T) == sizeof(A)) {
              if (reads_image()) return image_plane(b, d);
            }
            return padded_plane(plane, of_part(operand_, part) + d * plane_size, block_size);
          };
          by_filtering<m>().run(plane, pixels(), weight_, packed_.panel_size(), of_part(result_, part), ldc_,
                                of_part(patches_, part), of_part(products_, part), prefetch);
          for (int64_t h = 0; h < b.size[1]; ++h) {
            for (int64_t j = 0; j < f_.shape.out; j += Output<T>::columns) {
              output.store_rows(of_part(result_, part) + h * b.size[2] * ldc_ + j, ldc_, grid_.pixel(b, d, h, 0),
                                b.size[2], j);
            }
          }
        }
      });
    }
  }

  const Forward& f_;
  const StridedConv* strided_;
  Arena arena_;
  NormVectors<T> norm_;
  PackedWeight<P> packed_;
  Windows windows_;
  int64_t blocks_, chunk_, ldc_, parts_, strip_;
  Grid grid_;
  E *weight_, *operand_, *patches_ = nullptr;
  A *partial_, *bias_, *result_, *rest_, *products_ = nullptr;
  Step* steps_;
  int64_t *first_pixels_, *seen_, *next_boxes_;
  size_t for_parts_, part_bytes_;
};

template <class T, class P>
struct StridedConvKernel : ForwardKernel<T, P> {
  StridedConvKernel(const StridedConv& f, void* workspace, int threads)
      : ForwardKernel<T, P>(f, workspace, threads, &f) {}
};

}  // namespace fused_densenet::FD_ISA
