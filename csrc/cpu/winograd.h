// Winograd's minimal filtering F(2x2, 3x3) (arXiv 1509.09308): 16 multiplications for 4 outputs of a 3x3 convolution
// instead of 36, as 16 matrix products over patches of 4x4 pixels.
//
//     out = A' [(G w G') * (B' d B)] A        dw = G' [(A g A') * (B' d B)] G
//
// with d a patch, w the weight, g a tile of 2x2 gradients, * element by element and summed over channels or tiles.

namespace fused_densenet::FD_ISA {

constexpr int64_t kPositions = 16;
constexpr int64_t kPatchBytes = 28 << 10;  // of a core's first-level cache, for a row of a strip's patches

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
  PixelPlane at_block(int64_t k) const { return {first + k * block, pixel, row, block, top, bottom, left, right}; }
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

// A row of patches: `count` channels of tiles [first, first + tiles) of pixels with a margin of 1, to
// out[4][tile][kBlock]. (All four rows at once would fill more than the first-level cache.)
template <class A>
void transform_patches(const TilePlane& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles, int64_t count,
                       int64_t row, A* out) {
  using V = Vec<A>;
  const PatchRow r = kPatchRows[row];
  const V sign = V::all(static_cast<A>(r.sign));
  const int64_t next = tiles * kBlock;
  plane.for_each(first, tiles, [&](int64_t t, int64_t y, int64_t x) {
    with_pixels<4>(pixels, y, x, [&](auto at) {
      A* to = out + t * kBlock;
      for (int64_t c = 0; c < count; c += V::size) {
        V d[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) d[i] = fma(sign, load(at(r.second, i) + c), load(at(r.first, i) + c));
        store(to + c, d[0] - d[2]);
        store(to + next + c, d[1] + d[2]);
        store(to + 2 * next + c, d[2] - d[1]);
        store(to + 3 * next + c, d[1] - d[3]);
      }
    });
  });
}

// A row of tiles of gradients: as above, of pixels without a margin; A g A'.
template <class A>
void transform_gradients(const TilePlane& plane, const PixelPlane<A>& pixels, int64_t first, int64_t tiles,
                         int64_t count, int64_t row, A* out) {
  using V = Vec<A>;
  const int64_t next = tiles * kBlock;
  const auto combined = [&](V upper, V lower) {
    return row == 0 ? upper : row == 1 ? upper + lower : row == 2 ? upper - lower : V::zero() - lower;
  };
  plane.for_each(first, tiles, [&](int64_t t, int64_t y, int64_t x) {
    with_pixels<2>(pixels, y, x, [&](auto at) {
      A* to = out + t * kBlock;
      for (int64_t c = 0; c < count; c += V::size) {
        const V left = combined(load(at(0, 0) + c), load(at(1, 0) + c));
        const V right = combined(load(at(0, 1) + c), load(at(1, 1) + c));
        store(to + c, left);
        store(to + next + c, left + right);
        store(to + 2 * next + c, left - right);
        store(to + 3 * next + c, V::zero() - right);
      }
    });
  });
}

// What a row of products m[4][tile][ld] adds to pixels result[pixel][ldc]: A' m A.
template <class A>
void transform_outputs(const TilePlane& plane, const A* m, int64_t ld, int64_t first, int64_t tiles, int64_t columns,
                       int64_t row, A* result, int64_t ldc) {
  using V = Vec<A>;
  plane.for_each(first, tiles, [&](int64_t t, int64_t y, int64_t x) {
    A* to = result + (y * plane.width + x) * ldc;
    const bool right = x + 1 < plane.width, below = y + 1 < plane.height;
    for (int64_t c = 0; c < columns; c += V::size) {
      const A* from = m + t * ld + c;
      const V m1 = load(from + tiles * ld), m2 = load(from + 2 * tiles * ld);
      const V sums[2] = {load(from) + m1 + m2, m1 - m2 - load(from + 3 * tiles * ld)};
      for (int64_t j = 0; j < (right ? 2 : 1); ++j) {
        A *upper = to + j * ldc + c, *lower = upper + plane.width * ldc;
        if (row < 3) store(upper, row == 0 ? sums[j] : load(upper) + sums[j]);
        if (row > 0 && below) store(lower, row == 1 ? sums[j] : load(lower) - sums[j]);
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

// The convolution of a plane of pixels with a weight packed as 16 matrices, to result[pixel][ldc]; a strip of tiles at
// a time, and of their patches a row, which stays in the first-level cache. `patches` and `products` hold that.
template <class P>
class WinogradProduct {
  using A = typename P::Acc;
  static constexpr int64_t width = Layout<P, Reduce::channels>::panel;

 public:
  int64_t rows, columns;  // channels read and written
  int64_t blocks() const { return ceil_div(rows, kBlock); }
  int64_t strip() const {
    return most(kPatchBytes / (4 * blocks() * kBlock * static_cast<int64_t>(sizeof(A))) / kTileRows, 1) * kTileRows;
  }
  int64_t patches_size() const { return blocks() * 4 * strip() * kBlock; }
  int64_t products_size() const { return 4 * strip() * round_up(columns, width); }
  int64_t work(const TilePlane& plane) const {
    const int64_t strips = ceil_div(plane.rows() * plane.columns(), strip());
    return strips * kPositions * rows *
           tiles_of<P, Reduce::channels>(ceil_div(plane.rows() * plane.columns(), strips), columns);
  }

  void run(const TilePlane& plane, const PixelPlane<A>& pixels, const A* weight, int64_t panel_size, A* result,
           int64_t ldc, A* patches, A* products, Step* steps, Prefetch& prefetch) const {
    const int64_t all = plane.rows() * plane.columns(), strips = ceil_div(all, strip()), ld = round_up(columns, width);
    for (int64_t s = 0; s < strips; ++s) {
      const Range range = split(all, strips, s);
      const int64_t tiles = range.size();
      for (int64_t row = 0; row < 4; ++row) {
        for (int64_t k = 0; k < blocks(); ++k) {
          const int64_t count = least(kBlock, rows - k * kBlock);
          transform_patches(plane, pixels.at_block(k), range.begin, tiles, count, row,
                            patches + k * 4 * tiles * kBlock);
          steps[k] = {k * 4 * tiles * kBlock, k * kBlock * width, count};
        }
        for (int64_t i = 0; i < 4; ++i) {
          multiply<P, Reduce::channels>(patches + i * tiles * kBlock, kBlock, weight + (4 * row + i) * rows * width,
                                        panel_size, products + i * tiles * ld, ld, tiles, columns, steps, blocks(),
                                        false, prefetch);
        }
        transform_outputs(plane, products, ld, range.begin, tiles, columns, row, result, ldc);
      }
    }
  }
};

}  // namespace fused_densenet::FD_ISA
