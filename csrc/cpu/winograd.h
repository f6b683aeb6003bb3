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

// Four points of one dimension, transformed in place.
template <class V>
inline void transform_patch(V* x, int64_t step) {  // B'
  const V x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step];
  x[0] = x0 - x2;
  x[step] = x1 + x2;
  x[2 * step] = x2 - x1;
  x[3 * step] = x1 - x3;
}

// Tiles of 2x2 outputs in a plane of `height` x `width` pixels, row by row.
struct TilePlane {
  int64_t height, width;
  int64_t rows() const { return ceil_div(height, 2); }
  int64_t columns() const { return ceil_div(width, 2); }
};

// Patches: `count` channels of tiles [first, first + tiles) of an operand [padded pixel][kBlock] whose margin is 1, to
// out[position][tile][kBlock].
template <class A>
void transform_patches(const TilePlane& plane, const A* operand, int64_t first, int64_t tiles, int64_t count, A* out) {
  using V = Vec<A>;
  alignas(64) static const A nothing[kBlock] = {};
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t y = (first + t) / plane.columns() * 2, x = (first + t) % plane.columns() * 2;
    const A* from[kPositions];
    for (int64_t i = 0; i < kPositions; ++i) {
      const bool inside = y + i / 4 < plane.height + 2 && x + i % 4 < plane.width + 2;
      from[i] = inside ? operand + ((y + i / 4) * (plane.width + 2) + x + i % 4) * kBlock : nothing;
    }
    for (int64_t c = 0; c < count; c += V::size) {
      V d[kPositions];
#pragma GCC unroll 16
      for (int i = 0; i < kPositions; ++i) d[i] = load(from[i] + c);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) transform_patch(d + i, 4);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) transform_patch(d + 4 * i, 1);
#pragma GCC unroll 16
      for (int i = 0; i < kPositions; ++i) store(out + (i * tiles + t) * kBlock + c, d[i]);
    }
  }
}

// Tiles of gradients: as above, from the operand's pixels inside the margin; A g A'.
template <class A>
void transform_gradients(const TilePlane& plane, const A* operand, int64_t first, int64_t tiles, int64_t count,
                         A* out) {
  using V = Vec<A>;
  alignas(64) static const A nothing[kBlock] = {};
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t y = (first + t) / plane.columns() * 2, x = (first + t) % plane.columns() * 2;
    const A* from[4];
    for (int64_t i = 0; i < 4; ++i) {
      const bool inside = y + i / 2 < plane.height && x + i % 2 < plane.width;
      from[i] = inside ? operand + ((y + i / 2 + 1) * (plane.width + 2) + x + i % 2 + 1) * kBlock : nothing;
    }
    for (int64_t c = 0; c < count; c += V::size) {
      V rows[4][2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const V g0 = load(from[j] + c), g1 = load(from[2 + j] + c);
        rows[0][j] = g0;
        rows[1][j] = g0 + g1;
        rows[2][j] = g0 - g1;
        rows[3][j] = V::zero() - g1;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        A* to = out + (4 * i * tiles + t) * kBlock + c;
        store(to, rows[i][0]);
        store(to + tiles * kBlock, rows[i][0] + rows[i][1]);
        store(to + 2 * tiles * kBlock, rows[i][0] - rows[i][1]);
        store(to + 3 * tiles * kBlock, V::zero() - rows[i][1]);
      }
    }
  }
}

// Products m[position][tile][ldc] back to pixels result[pixel][ldc]: A' m A.
template <class A>
void transform_outputs(const TilePlane& plane, const A* m, int64_t first, int64_t tiles, int64_t columns, A* result,
                       int64_t ldc) {
  using V = Vec<A>;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t y = (first + t) / plane.columns() * 2, x = (first + t) % plane.columns() * 2;
    A* to = result + (y * plane.width + x) * ldc;
    const bool right = x + 1 < plane.width, below = y + 1 < plane.height;
    for (int64_t c = 0; c < columns; c += V::size) {
      V rows[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const A* from = m + (j * tiles + t) * ldc + c;
        const V m0 = load(from), m1 = load(from + 4 * tiles * ldc), m2 = load(from + 8 * tiles * ldc);
        rows[0][j] = m0 + m1 + m2;
        rows[1][j] = m1 - m2 - load(from + 12 * tiles * ldc);
      }
      store(to + c, rows[0][0] + rows[0][1] + rows[0][2]);
      if (right) store(to + ldc + c, rows[0][1] - rows[0][2] - rows[0][3]);
      if (!below) continue;
      store(to + plane.width * ldc + c, rows[1][0] + rows[1][1] + rows[1][2]);
      if (right) store(to + (plane.width + 1) * ldc + c, rows[1][1] - rows[1][2] - rows[1][3]);
    }
  }
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

// The convolution of a box's operand [block][padded pixel][kBlock] with a weight packed as 16 matrices, to
// result[pixel][ldc]; a strip of tiles at a time. `patches` and `products` hold a strip.
template <class P>
class WinogradProduct {
  using A = typename P::Acc;

 public:
  int64_t rows, columns;  // channels read and written
  int64_t blocks() const { return ceil_div(rows, kBlock); }
  int64_t strip() const {
    return most(kTileRows,
                least(4 * kTileRows, (224 << 10) / (kPositions * blocks() * kBlock * static_cast<int64_t>(sizeof(A)))));
  }
  int64_t patches_size() const { return blocks() * kPositions * strip() * kBlock; }
  int64_t products_size(int64_t ldc) const { return kPositions * strip() * ldc; }
  int64_t work(const TilePlane& plane) const {
    const int64_t strips = ceil_div(plane.rows() * plane.columns(), strip());
    return strips * kPositions * rows *
           tiles_of<P, Reduce::channels>(ceil_div(plane.rows() * plane.columns(), strips), columns);
  }

  void run(const TilePlane& plane, const A* operand, int64_t block_size, const A* weight, int64_t panel_size, A* result,
           int64_t ldc, A* patches, A* products, Step* steps, Prefetch& prefetch) const {
    constexpr int64_t width = Layout<P, Reduce::channels>::panel;
    const int64_t all = plane.rows() * plane.columns(), strips = ceil_div(all, strip());
    for (int64_t s = 0; s < strips; ++s) {
      const Range range = split(all, strips, s);
      const int64_t tiles = range.size();
      for (int64_t k = 0; k < blocks(); ++k) {
        const int64_t count = least(kBlock, rows - k * kBlock);
        transform_patches(plane, operand + k * block_size, range.begin, tiles, count,
                          patches + k * kPositions * tiles * kBlock);
        steps[k] = {k * kPositions * tiles * kBlock, k * kBlock * width, count};
      }
      for (int64_t i = 0; i < kPositions; ++i) {
        multiply<P, Reduce::channels>(patches + i * tiles * kBlock, kBlock, weight + i * rows * width, panel_size,
                                      products + i * tiles * ldc, ldc, tiles, columns, steps, blocks(), false,
                                      prefetch);
      }
      transform_outputs(plane, products, range.begin, tiles, columns, result, ldc);
    }
  }
};

}  // namespace fused_densenet::FD_ISA
