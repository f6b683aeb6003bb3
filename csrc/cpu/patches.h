// Patches for Winograd's filtering: tiles of a plane, where their pixels are, and B' d B of them.

namespace fused_densenet::FD_ISA {

// Tiles of m x m outputs in a plane of `height` x `width` pixels, row by row.
template <int m>
struct TilePlane {
  int64_t height, width;
  int64_t rows() const { return ceil_div(height, m); }
  int64_t columns() const { return ceil_div(width, m); }
  int64_t count() const { return rows() * columns(); }
  // Calls f(tile, y, x, count) with the upper left pixel of each run of neighbours in a row, of `tiles` tiles from
  // `first` on.
  template <class F>
  void for_each_run(int64_t first, int64_t tiles, F f) const {
    for (int64_t t = 0; t < tiles;) {
      const int64_t row = (first + t) / columns(), column = (first + t) % columns();
      const int64_t count = least(columns() - column, tiles - t);
      f(t, row * m, column * m, count);
      t += count;
    }
  }
};

// Pixels as patches read them: `pixel` and `row` elements apart, kBlock channels of them, and `block` elements on the
// next; those of rows [top, bottom) and columns [left, right) are there, others are zeros.
template <class A>
struct PixelPlane {
  const A* first;
  int64_t pixel, row, block, top, bottom, left, right;
  PixelPlane from(int64_t elements) const { return {first + elements, pixel, row, block, top, bottom, left, right}; }
  PixelPlane at_block(int64_t k) const { return from(k * block); }

  // Calls f(from, steps, inside) for `rows` rows of `columns` from (y, x): column c of row r is at from[r] + c *
  // steps[r], if it is `inside`.
  template <int rows, class F>
  void with_rows(int64_t y, int64_t x, int64_t columns, F f) const {
    alignas(64) static const A nothing[kBlock] = {};
    const A* from[rows];
    int64_t steps[rows];
    for (int64_t r = 0; r < rows; ++r) {
      const bool inside = y + r >= top && y + r < bottom;
      from[r] = inside ? first + (y + r) * row + x * pixel : nothing;
      steps[r] = inside ? pixel : 0;
    }
    const int64_t begin = least(columns, most(0, left - x));
    f(from, steps, Range{begin, most(begin, least(columns, right - x))});
  }
};

// An operand [block][padded pixel][kBlock] whose margin is 1.
template <class A, int m>
PixelPlane<A> padded_plane(const TilePlane<m>& plane, const A* operand, int64_t block) {
  return {operand, kBlock, (plane.width + 2) * kBlock, block, 0, plane.height + 2, 0, plane.width + 2};
}
// The same without its margin.
template <class A, int m>
PixelPlane<A> plane_inside(const TilePlane<m>& plane, const A* operand, int64_t block) {
  const int64_t row = (plane.width + 2) * kBlock;
  return {operand + row + kBlock, kBlock, row, block, 0, plane.height, 0, plane.width};
}

// Of the rows, and of the columns, of B' d B, the first and last, or two neighbours within: they are of the same
// pixels.
template <int m, int p>
struct Pair {
  static constexpr int first = p == 0 ? 0 : 2 * p - 1, second = p == 0 ? m + 1 : 2 * p;
};
template <int m>
constexpr int kPairs = m / 2 + 1;

// Calls f.operator()<vectors>(c) for `channels` from c = 0 on, up to a whole vector: four vectors at once, two or one.
template <class A, class F>
void in_vectors(int64_t channels, const F& f) {
  constexpr int64_t size = Vec<A>::size;
  const int64_t all = round_up(channels, size);
  int64_t c = 0;
  for (; c + 4 * size <= all; c += 4 * size) f.template operator()<4>(c);
  for (; c + 2 * size <= all; c += 2 * size) f.template operator()<2>(c);
  if (c < all) f.template operator()<1>(c);
}

// Calls f(at) where at(h, w) is pixel (y + h, x + w), for h and w less than `size`.
template <int64_t size, class A, class F>
void with_pixels(const PixelPlane<A>& p, int64_t y, int64_t x, F f) {
  const A* first = p.first + y * p.row + x * p.pixel;
  if (y >= p.top && y + size <= p.bottom && x >= p.left && x + size <= p.right) {
    return f([=](int64_t h, int64_t w) { return first + h * p.row + w * p.pixel; });
  }
  alignas(64) static const A nothing[kBlock] = {};
  f([=](int64_t h, int64_t w) {
    const bool inside = y + h >= p.top && y + h < p.bottom && x + w >= p.left && x + w < p.right;
    return inside ? first + h * p.row + w * p.pixel : nothing;
  });
}

// Which rows of a patch make row `i` of B' d with m = 2, the second one times `sign`; the same for columns.
struct PatchRow {
  int64_t first, second;
  int sign;
};
constexpr PatchRow kPatchRows[4] = {{0, 2, -1}, {1, 2, 1}, {2, 1, -1}, {1, 3, -1}};

// The outer or the inner pair of a row's four numbers with m = 2, straight from the pixels: `vectors` vectors of
// channels of tiles [first, first + tiles), to out[tile][kBlock] and `apart` elements behind it.
template <bool inner, int vectors, class A>
void transform_patches_of_2(const TilePlane<2>& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles,
                            int64_t row, A* out, int64_t apart) {
  using V = Vec<A>;
  const PatchRow r = kPatchRows[row];
  const V sign = V::all(static_cast<A>(r.sign));
  int64_t y = first / plane.columns() * 2, x = first % plane.columns() * 2;
  for (int64_t t = 0; t < tiles;) {
    A* to = out + t * kBlock;
    const bool rows_inside = y >= pixels.top && y + 4 <= pixels.bottom && x >= pixels.left;
    const int64_t inside = rows_inside ? (pixels.right - x) / 2 - 1 : 0;
    const int64_t neighbours = least(least(inside, plane.columns() - x / 2), tiles - t);
    if (neighbours <= 0) {
      with_pixels<4>(pixels, y, x, [&](auto at) {
        const A *upper[4], *lower[4];
        for (int i = 0; i < 4; ++i) upper[i] = at(r.first, i), lower[i] = at(r.second, i);
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors * V::size; v += V::size) {
          const auto column = [&](int i) { return fma(sign, load(lower[i] + v), load(upper[i] + v)); };
          store(to + v, inner ? column(1) + column(2) : column(0) - column(2));
          store(to + apart + v, inner ? column(2) - column(1) : column(1) - column(3));
        }
      });
    } else {
      const A* upper = pixels.first + (y + r.first) * pixels.row + x * pixels.pixel;
      const A* lower = pixels.first + (y + r.second) * pixels.row + x * pixels.pixel;
      const auto column = [&](int64_t i, int v) {
        const int64_t at = i * pixels.pixel + v * V::size;
        return fma(sign, load(lower + at), load(upper + at));
      };
      V d0[vectors], d1[vectors];  // the columns that a tile has from its neighbour
#pragma GCC unroll 4
      for (int v = 0; v < vectors && !inner; ++v) d0[v] = column(0, v), d1[v] = column(1, v);
      for (int64_t i = 0; i < neighbours; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          if constexpr (inner) {
            const V left = column(1, v), right = column(2, v);
            store(to + v * V::size, left + right);
            store(to + apart + v * V::size, right - left);
          } else {
            const V d2 = column(2, v), d3 = column(3, v);
            store(to + v * V::size, d0[v] - d2);
            store(to + apart + v * V::size, d1[v] - d3);
            d0[v] = d2;
            d1[v] = d3;
          }
        }
        to += kBlock;
        upper += 2 * pixels.pixel;
        lower += 2 * pixels.pixel;
      }
    }
    t += most(neighbours, 1);
    x += 2 * most(neighbours, 1);
    if (x >= plane.width) x = 0, y += 2;
  }
}

// Pair q of the rows of B' d of tiles [first, first + tiles), all columns of one run of neighbours behind those of the
// one before: to out[column][kBlock] and `apart` elements behind it.
template <int q, int m, class A>
void transform_rows(const TilePlane<m>& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles,
                    int64_t channels, A* out, int64_t apart) {
  using V = Vec<A>;
  using M = Patches<m>;
  plane.for_each_run(first, tiles, [&](int64_t, int64_t y, int64_t x, int64_t count) {
    const int64_t columns = count * m + 2;
    pixels.template with_rows<m + 2>(y, x, columns, [&](const auto& from, const auto& steps, Range inside) {
      in_vectors<A>(channels, [&]<int vectors>(int64_t channel) __attribute__((always_inline)) {
        const A* d[m + 2];
        for (int64_t r = 0; r < m + 2; ++r) d[r] = from[r] + inside.begin * steps[r] + channel;
        A* to = out + channel;
        const auto zeros = [&](int64_t count) {
          for (int64_t c = 0; c < count; ++c, to += kBlock) {
            each<vectors>([&]<int v>() __attribute__((always_inline)) {
              store(to + v * V::size, V::zero());
              store(to + apart + v * V::size, V::zero());
            });
          }
        };
        zeros(inside.begin);
        for (int64_t c = inside.begin; c < inside.end; ++c, to += kBlock) {
          each<vectors>([&]<int v>() __attribute__((always_inline)) {
            V pixel[m + 2];
            each<m + 2>([&]<int r>() __attribute__((always_inline)) { pixel[r] = load(d[r] + v * V::size); });
            const V one = combined<M, Pair<m, q>::first>(pixel), other = combined<M, Pair<m, q>::second>(pixel);
            store(to + v * V::size, one);
            store(to + apart + v * V::size, other);
          });
          each<m + 2>([&]<int r>() __attribute__((always_inline)) { d[r] += steps[r]; });
        }
        zeros(columns - inside.end);
      });
    });
    out += columns * kBlock;
  });
}

// Pair p of the columns of B' d B, of a row of B' d: to out[tile][kBlock] and `apart` elements behind it.
template <int p, int m, class A>
void transform_columns(const TilePlane<m>& plane, const A* row, int64_t first, int64_t tiles, int64_t channels, A* out,
                       int64_t apart) {
  using V = Vec<A>;
  using M = Patches<m>;
  plane.for_each_run(first, tiles, [&](int64_t, int64_t, int64_t, int64_t count) {
    in_vectors<A>(channels, [&]<int vectors>(int64_t channel) __attribute__((always_inline)) {
      for (int64_t t = 0; t < count; ++t) {
        each<vectors>([&]<int v>() __attribute__((always_inline)) {
          V d[m + 2];
          each<m + 2>([&]<int j>() __attribute__((always_inline)) {
            d[j] = load(row + (t * m + j) * kBlock + channel + v * V::size);
          });
          A* const to = out + t * kBlock + channel + v * V::size;
          store(to, combined<M, Pair<m, p>::first>(d));
          store(to + apart, combined<M, Pair<m, p>::second>(d));
        });
      }
    });
    out += count * kBlock;
    row += (count * m + 2) * kBlock;
  });
}

// B' d B of a strip of up to `most_tiles` tiles, two matrices at a time: more would not stay in the first-level cache,
// and a store to the second takes four times as long. With m = 4 a pair of rows is transformed once for all columns, in
// scratch memory of `scratch_size`; with m = 2 that is no faster than to read the pixels twice.
template <int m, int64_t most_tiles, class A>
class Strip {
 public:
  static constexpr int64_t scratch_size = m == 2 ? 0 : 2 * (m + 2) * most_tiles * kBlock;

  Strip(const TilePlane<m>& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles, int64_t channels,
        A* scratch)
      : plane_(plane), pixels_(pixels), first_(first), tiles_(tiles), channels_(channels), scratch_(scratch) {}

  template <int q>
  void begin_pair_of_rows() const {
    if constexpr (m > 2) transform_rows<q>(plane_, pixels_, first_, tiles_, channels_, scratch_, scratch_size / 2);
  }
  // Of the first or second row of the pair q, the pair p of columns.
  template <int q, int p>
  void columns(bool second, A* out, int64_t apart) const {
    if constexpr (m > 2) {
      transform_columns<p>(plane_, scratch_ + (second ? scratch_size / 2 : 0), first_, tiles_, channels_, out, apart);
    } else {
      const int64_t row = second ? Pair<m, q>::second : Pair<m, q>::first;
      in_vectors<A>(channels_, [&]<int vectors>(int64_t c) __attribute__((always_inline)) {
        transform_patches_of_2<p == 1, vectors>(plane_, pixels_.from(c), first_, tiles_, row, out + c, apart);
      });
    }
  }

 private:
  const TilePlane<m> plane_;
  const PixelPlane<A> pixels_;
  int64_t first_, tiles_, channels_;
  A* scratch_;
};

}  // namespace fused_densenet::FD_ISA
