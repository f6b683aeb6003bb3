// Winograd's minimal filtering F(2x2, 3x3) (arXiv 1509.09308): 16 multiplications for 4 outputs of a 3x3 convolution
// instead of 36, as 16 matrix products over patches of 4x4 pixels.
//
//     out = A' [(G w G') * (B' d B)] A        dw = G' [(A g A') * (B' d B)] G
//
// with d a patch, w the weight, g a tile of 2x2 gradients, * element by element and summed over channels or tiles.

namespace fused_densenet::FD_ISA {

constexpr int64_t kPositions = 16;

// Whether a convolution runs this way: float32 arithmetic, 3x3 in the plane, and enough channels and pixels to gain.
template <class P>
bool use_winograd(const Shape& s) {
  return sizeof(typename P::Acc) == 4 && P::pair == 1 && s.kd == 1 && s.kh == 3 && s.kw == 3 && s.h >= 4 && s.w >= 4 &&
         s.in * s.out >= 256 && s.pixels() >= 128;
}

// Tiles of 2x2 outputs in a plane of `height` x `width` pixels, row by row.
struct TilePlane {
  int64_t height, width;
  int64_t rows() const { return ceil_div(height, 2); }
  int64_t columns() const { return ceil_div(width, 2); }
  // Calls f(tile, y, x) with the upper left pixel of each of `tiles` tiles from `first` on.
  template <class F>
  void for_each(int64_t first, int64_t tiles, F f) const {
    int64_t y = first / columns() * 2, x = first % columns() * 2;
    for (int64_t t = 0; t < tiles; ++t) {
      f(t, y, x);
      x += 2;
      if (x >= width) x = 0, y += 2;
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
};

// An operand [block][padded pixel][kBlock] whose margin is 1.
template <class A>
PixelPlane<A> padded_plane(const TilePlane& plane, const A* operand, int64_t block) {
  return {operand, kBlock, (plane.width + 2) * kBlock, block, 0, plane.height + 2, 0, plane.width + 2};
}
// The same without its margin.
template <class A>
PixelPlane<A> plane_inside(const TilePlane& plane, const A* operand) {
  const int64_t row = (plane.width + 2) * kBlock;
  return {operand + row + kBlock, kBlock, row, 0, 0, plane.height, 0, plane.width};
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

// Which rows of a patch make row `i` of B' d B, the second one times `sign`; the same for columns.
struct PatchRow {
  int64_t first, second;
  int sign;
};
constexpr PatchRow kPatchRows[4] = {{0, 2, -1}, {1, 2, 1}, {2, 1, -1}, {1, 3, -1}};

// The outer or the inner two of a row's four numbers of each patch: `vectors` vectors of channels of tiles [first,
// first + tiles) of pixels with a margin of 1, to out[tile][kBlock] and `apart` elements behind it. (More at once would
// go through the second-level cache, where a store takes four times as long.)
template <bool inner, int vectors, class A>
void transform_patches(const TilePlane& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles, int64_t row,
                       A* out, int64_t apart) {
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

template <bool inner, class A>
void transform_patches(const TilePlane& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles, int64_t count,
                       int64_t row, A* out, int64_t apart) {
  constexpr int64_t size = Vec<A>::size;
  int64_t c = 0;
  const auto in_vectors = [&]<int vectors>() {
    for (; c + vectors * size <= round_up(count, size); c += vectors * size) {
      transform_patches<inner, vectors>(plane, pixels.from(c), first, tiles, row, out + c, apart);
    }
  };
  in_vectors.template operator()<4>();
  in_vectors.template operator()<2>();
  in_vectors.template operator()<1>();
}

// A row of tiles of gradients, of pixels without a margin, to out[4][tile][kBlock]; A g A'.
template <bool both_rows, class A>
void transform_gradients(const TilePlane& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles,
                         int64_t count, int64_t row, A* out) {
  using V = Vec<A>;
  const V sign = V::all(A(row < 2 ? 1 : -1));
  const int64_t next = tiles * kBlock;
  plane.for_each(first, tiles, [&](int64_t t, int64_t y, int64_t x) {
    with_pixels<2>(pixels, y, x, [&](auto at) {
      const A *upper[2] = {at(0, 0), at(0, 1)}, *lower[2] = {at(1, 0), at(1, 1)};
      const A* const* only = row == 0 ? upper : lower;
      A* to = out + t * kBlock;
      for (int64_t c = 0; c < count; c += V::size) {
        const auto column = [&](int i) {
          return both_rows ? fma(sign, load(lower[i] + c), load(upper[i] + c)) : sign * load(only[i] + c);
        };
        const V left = column(0), right = column(1);
        store(to + c, left);
        store(to + next + c, left + right);
        store(to + 2 * next + c, left - right);
        store(to + 3 * next + c, V::zero() - right);
      }
    });
  });
}

// Products m[16][tile][ld] to pixels result[pixel][ldc]: A' m A.
template <class A>
void transform_outputs(const TilePlane& plane, const A* m, int64_t ld, int64_t first, int64_t tiles, int64_t columns,
                       A* result, int64_t ldc) {
  using V = Vec<A>;
  plane.for_each(first, tiles, [&](int64_t t, int64_t y, int64_t x) {
    A* to = result + (y * plane.width + x) * ldc;
    const bool right = x + 1 < plane.width, below = y + 1 < plane.height;
    for (int64_t c = 0; c < columns; c += V::size) {
      V sums[4][2];
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const A* from = m + (4 * i * tiles + t) * ld + c;
        const V m1 = load(from + tiles * ld), m2 = load(from + 2 * tiles * ld);
        sums[i][0] = load(from) + m1 + m2;
        sums[i][1] = m1 - m2 - load(from + 3 * tiles * ld);
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; ++j) {
        if (j == 1 && !right) break;
        A* upper = to + j * ldc + c;
        store(upper, sums[0][j] + sums[1][j] + sums[2][j]);
        if (below) store(upper + plane.width * ldc, sums[1][j] - sums[2][j] - sums[3][j]);
      }
    }
  });
}

// A row of a weight, w[9][width] to 16 rows of u, `step` apart: G w G'.
template <class A>
void transform_weight(const A* w, int64_t width, int64_t columns, A* u, int64_t step) {
  using V = Vec<A>;
  const V half = V::all(A(0.5));
  for (int64_t j = 0; j < columns; j += V::size) {
    V rows[4][3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const V w0 = load(w + i * width + j), w1 = load(w + (3 + i) * width + j), w2 = load(w + (6 + i) * width + j);
      rows[0][i] = w0;
      rows[1][i] = (w0 + w1 + w2) * half;
      rows[2][i] = (w0 - w1 + w2) * half;
      rows[3][i] = w2;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V* r = rows[i];
      A* to = u + 4 * i * step + j;
      store(to, r[0]);
      store(to + step, (r[0] + r[1] + r[2]) * half);
      store(to + 2 * step, (r[0] - r[1] + r[2]) * half);
      store(to + 3 * step, r[2]);
    }
  }
}

// Its gradient: u[16] to w[9], G' u G.
template <class V>
void transform_dweight(const V* u, V* w) {
  const V half = V::all(0.5f);
  V rows[3][4];
  for (int j = 0; j < 4; ++j) {
    const V sum = (u[4 + j] + u[8 + j]) * half;
    rows[0][j] = u[j] + sum;
    rows[1][j] = (u[4 + j] - u[8 + j]) * half;
    rows[2][j] = sum + u[12 + j];
  }
  for (int i = 0; i < 3; ++i) {
    const V* r = rows[i];
    const V sum = (r[1] + r[2]) * half;
    w[3 * i] = r[0] + sum;
    w[3 * i + 1] = (r[1] - r[2]) * half;
    w[3 * i + 2] = sum + r[3];
  }
}

// The convolution of a plane of pixels with a weight packed as 16 matrices, to result[pixel][ldc]; a strip of tiles and
// two matrices at a time, whose `patches` stay in the first-level cache. `products` holds a strip's.
template <class P>
class WinogradProduct {
  using A = typename P::Acc;
  static constexpr int64_t width = Layout<P, Reduce::channels>::panel;

 public:
  int64_t rows, columns;  // channels read and written
  int64_t blocks() const { return ceil_div(rows, kBlock); }
  int64_t patches_size() const { return 2 * kTileRows * kBlock; }
  int64_t products_size() const { return kPositions * kTileRows * round_up(columns, width); }
  int64_t work(const TilePlane& plane) const {
    return kPositions * rows * tiles_of<P, Reduce::channels>(plane.rows() * plane.columns(), columns);
  }

  void run(const TilePlane& plane, const PixelPlane<A>& pixels, const A* weight, int64_t panel_size, A* result,
           int64_t ldc, A* patches, A* products, Prefetch& prefetch) const {
    const int64_t all = plane.rows() * plane.columns(), strips = ceil_div(all, kTileRows);
    const int64_t ld = round_up(columns, width);
    for (int64_t s = 0; s < strips; ++s) {
      const Range range = split(all, strips, s);
      const int64_t tiles = range.size(), apart = tiles * kBlock;
      for (int64_t row = 0; row < 4; ++row) {
        for (int64_t k = 0; k < blocks(); ++k) {
          const PixelPlane<A> block = pixels.at_block(k);
          const Step step{0, k * kBlock * width, least(kBlock, rows - k * kBlock)};
          const auto product = [&](const A* patches, int64_t position) {
            multiply<P, Reduce::channels>(patches, kBlock, weight + position * rows * width, panel_size,
                                          products + position * tiles * ld, ld, tiles, columns, &step, 1, k > 0,
                                          prefetch);
          };
          transform_patches<false>(plane, block, range.begin, tiles, step.k, row, patches, apart);
          product(patches, 4 * row);
          product(patches + apart, 4 * row + 3);
          transform_patches<true>(plane, block, range.begin, tiles, step.k, row, patches, apart);
          product(patches, 4 * row + 1);
          product(patches + apart, 4 * row + 2);
        }
      }
      transform_outputs(plane, products, ld, range.begin, tiles, columns, result, ldc);
    }
  }
};

}  // namespace fused_densenet::FD_ISA
