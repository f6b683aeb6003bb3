// Winograd's filtering (filtering.h) of weights, gradients and results; the convolution and its weight gradient by it.

namespace fused_densenet::FD_ISA {

// Row i of A g A' of pixels without a margin, to out[m + 2][tile][kBlock].
template <int i, int m, class A>
void transform_gradients(const TilePlane<m>& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles,
                         int64_t channels, A* out) {
  using V = Vec<A>;
  using M = Transposed<Outputs<m>>;
  plane.for_each_run(first, tiles, [&](int64_t tile, int64_t y, int64_t x, int64_t count) {
    pixels.template with_rows<m>(y, x, count * m, [&](const auto& from, const auto& steps, Range inside) {
      for (int64_t t = 0; t < count; ++t) {
        A* const to = out + (tile + t) * kBlock;
        for (int64_t v = 0; v < channels; v += V::size) {
          V g[m];
          each<m>([&]<int j>() __attribute__((always_inline)) {
            const int64_t c = t * m + j;
            if (c < inside.end) {
              V d[m];
              each<m>([&]<int r>() __attribute__((always_inline)) {
                if constexpr (M::at(i, r) != 0) d[r] = load(from[r] + c * steps[r] + v);
              });
              g[j] = combined<M, i>(d);
            } else {
              g[j] = V::zero();
            }
          });
          each<m + 2>([&]<int j>()
                          __attribute__((always_inline)) { store(to + j * tiles * kBlock + v, combined<M, j>(g)); });
        }
      }
    });
  });
}

// Products x[(m + 2)^2][tile][ld] to pixels result[pixel][ldc]: A' x A.
template <int m, class A>
void transform_outputs(const TilePlane<m>& plane, const A* x, int64_t ld, int64_t first, int64_t tiles, int64_t columns,
                       A* result, int64_t ldc) {
  using V = Vec<A>;
  plane.for_each_run(first, tiles, [&](int64_t tile, int64_t y, int64_t begin, int64_t count) {
    for (int64_t t = tile; t < tile + count; ++t) {
      const int64_t column = begin + (t - tile) * m, right = least(m, plane.width - column);
      const int64_t below = least(m, plane.height - y);
      A* const to = result + (y * plane.width + column) * ldc;
      for (int64_t c = 0; c < columns; c += V::size) {
        V sums[m][m + 2];  // [column][row]
        each<m + 2>([&]<int i>() __attribute__((always_inline)) {
          V row[m + 2];
          each<m + 2>([&]<int j>() __attribute__((always_inline)) {
            row[j] = load(x + ((i * (m + 2) + j) * tiles + t) * ld + c);
          });
          each<m>([&]<int j>() __attribute__((always_inline)) { sums[j][i] = combined<Outputs<m>, j>(row); });
        });
        each<m>([&]<int j>() __attribute__((always_inline)) {
          if (j >= right) return;
          each<m>([&]<int i>() __attribute__((always_inline)) {
            if (i < below) store(to + (i * plane.width + j) * ldc + c, combined<Outputs<m>, i>(sums[j]));
          });
        });
      }
    }
  });
}

// A row of a weight, w[9][width] to (m + 2)^2 rows of u, `step` apart: G w G'.
template <int m, class A>
void transform_weight(const A* w, int64_t width, int64_t columns, A* u, int64_t step) {
  using V = Vec<A>;
  for (int64_t c = 0; c < columns; c += V::size) {
    V numbers[3][3];  // [column][row]
    for (int64_t i = 0; i < 9; ++i) numbers[i % 3][i / 3] = load(w + i * width + c);
    each<m + 2>([&]<int i>() __attribute__((always_inline)) {
      V row[3];
      each<3>([&]<int j>() __attribute__((always_inline)) { row[j] = combined<Weights<m>, i>(numbers[j]); });
      each<m + 2>([&]<int j>() __attribute__((always_inline)) {
        store(u + (i * (m + 2) + j) * step + c, combined<Weights<m>, j>(row));
      });
    });
  }
}

// Its gradient: u[(m + 2)^2] to w[9], G' u G.
template <int m, class V>
void transform_dweight(const V* u, V* w) {
  using M = Transposed<Weights<m>>;
  V rows[3][m + 2];
  each<m + 2>([&]<int j>() __attribute__((always_inline)) {
    each<3>([&]<int i>() __attribute__((always_inline)) { rows[i][j] = combined<M, i>(u + j, m + 2); });
  });
  each<3>([&]<int i>() __attribute__((always_inline)) {
    each<3>([&]<int j>() __attribute__((always_inline)) { w[3 * i + j] = combined<M, j>(rows[i]); });
  });
}

// The convolution of a plane of pixels with a weight packed as (m + 2)^2 matrices, to result[pixel][ldc], a strip of
// tiles at a time. `products` holds a strip's.
template <class P, int m>
class WinogradProduct {
  using A = typename P::Acc;
  // Of a strip: those of one tile of the products; of four where it is small, or the weight would be read too often.
  static constexpr int64_t kTiles = kSmallTiles ? 4 * kTileRows : kTileRows;
  using Patches = Strip<m, kTiles, A>;
  static constexpr int64_t width = Layout<P, Reduce::channels>::panel;

 public:
  int64_t rows, columns;  // channels read and written
  int64_t blocks() const { return ceil_div(rows, kBlock); }
  static constexpr int64_t patches_size() { return 2 * kTiles * kBlock + Patches::scratch_size; }
  int64_t products_size() const { return positions_of(m) * kTiles * round_up(columns, width); }
  int64_t work(const TilePlane<m>& plane) const {
    return positions_of(m) * rows * tiles_of<P, Reduce::channels>(plane.count(), columns);
  }

  void run(const TilePlane<m>& plane, const PixelPlane<A>& pixels, const A* weight, int64_t panel_size, A* result,
           int64_t ldc, A* patches, A* products, Prefetch& prefetch) const {
    const int64_t all = plane.count(), strips = ceil_div(all, kTiles);
    const int64_t ld = round_up(columns, width);
    for (int64_t s = 0; s < strips; ++s) {
      const Range range = split(all, strips, s);
      const int64_t tiles = range.size(), apart = tiles * kBlock;
      each<kPairs<m>>([&]<int q>() __attribute__((always_inline)) {
        for (int64_t k = 0; k < blocks(); ++k) {
          const Step step{0, k * kBlock * width, least(kBlock, rows - k * kBlock)};
          const Patches strip(plane, pixels.at_block(k), range.begin, tiles, step.k, patches + 2 * kTiles * kBlock);
          const auto product = [&](const A* patches, int64_t position) {
            multiply<P, Reduce::channels>(patches, kBlock, weight + position * rows * width, panel_size,
                                          products + position * tiles * ld, ld, tiles, columns, &step, 1, k > 0,
                                          prefetch);
          };
          strip.template begin_pair_of_rows<q>();
          for (int second = 0; second < 2; ++second) {
            const int64_t row = second ? Pair<m, q>::second : Pair<m, q>::first;
            each<kPairs<m>>([&]<int p>() __attribute__((always_inline)) {
              strip.template columns<q, p>(second, patches, apart);
              product(patches, row * (m + 2) + Pair<m, p>::first);
              product(patches + apart, row * (m + 2) + Pair<m, p>::second);
            });
          }
        }
      });
      transform_outputs(plane, products, ld, range.begin, tiles, columns, result, ldc);
    }
  }
};

// What a plane of activations, a block of `channels` channels, and of gradients, `out_channels` of them, add to the
// weight's gradient, dweight[(m + 2)^2][dweight_rows][ld], a strip of tiles at a time. `gradients` holds a row of a
// strip's.
template <class P, int m>
struct WinogradWeightGradient {
  using A = typename P::Acc;
  using Patches = Strip<m, kChain, A>;
  static constexpr int64_t kRow = (m + 2) * kChain * kBlock;
  static constexpr int64_t patches_size() { return kRow + Patches::scratch_size; }
  static constexpr int64_t gradients_size() { return kRow; }

  int64_t channels, out_channels, dweight_rows, ld;

  void run(const TilePlane<m>& plane, const PixelPlane<A>& pixels, const PixelPlane<A>& gradient, A* dweight,
           A* patches, A* gradients, Prefetch& prefetch) const {
    const int64_t all = plane.count(), strips = ceil_div(all, kChain);
    for (int64_t s = 0; s < strips; ++s) {
      const Range range = split(all, strips, s);
      const int64_t tiles = range.size(), size = tiles * kBlock;
      const Patches strip(plane, pixels, range.begin, tiles, channels, patches + (m + 2) * size);
      each<kPairs<m>>([&]<int q>() {
        strip.template begin_pair_of_rows<q>();
        each<2>([&]<int second>() {
          constexpr int row = second ? Pair<m, q>::second : Pair<m, q>::first;
          each<kPairs<m>>([&]<int p>() {
            using Columns = Pair<m, p>;
            strip.template columns<q, p>(second, patches + Columns::first * size,
                                         (Columns::second - Columns::first) * size);
          });
          for (int64_t k = 0; k * kBlock < out_channels; ++k) {
            const int64_t count = least(kBlock, out_channels - k * kBlock);
            transform_gradients<row>(plane, gradient.at_block(k), range.begin, tiles, count, gradients);
            const Step step{0, 0, tiles};
            for (int64_t i = 0; i < m + 2; ++i) {
              A* const to = dweight + ((row * (m + 2) + i) * dweight_rows + k * kBlock) * ld;
              multiply<P, Reduce::pixels>(gradients + i * size, 1, patches + i * size, Layout<P, Reduce::pixels>::panel,
                                          to, ld, count, channels, &step, 1, true, prefetch);
            }
          }
        });
      });
    }
  }
};

}  // namespace fused_densenet::FD_ISA
