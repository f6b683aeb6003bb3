// How a convolution is cut: boxes of pixels whose operands fit in a core's cache, and the workspace they need.

namespace fused_densenet::FD_ISA {

constexpr int64_t kCacheBytes = 384 << 10;  // of a core's second-level cache, for the operands of one box
// For the activations of a strip of pixels: of the first-level cache; of the second, where AMX reads each of them far
// less often than the next strip's wait for what was just stored, or where tiles are so small that the weight's panels,
// read once for each, are what the first is for.
constexpr int64_t kStripBytes = (kWhole > 1 || kSmallTiles ? 64 : 16) << 10;
constexpr int64_t kLongest = most(8 * kTileRows, 96);  // pixels of a box's row
constexpr int64_t kReadBytes = 96 << 10;
// Of a 1x1 convolution whose pixels are read once: the first box is waited for, while the next is always on its way.
inline int64_t longest_read(int64_t bytes_per_pixel) {
  return kSmallTiles ? least(kLongest, most(kReadBytes / bytes_per_pixel, 2 * kTileRows)) : kLongest;
}
// Of a first-level cache of 48 KiB, those of AVX-512's newer cores: more, where a panel of the weight leaves as much.
#if defined(FD_AVX512) && !defined(FD_AMX)
constexpr int64_t kFirstCacheBytes = 40 << 10;
#else
constexpr int64_t kFirstCacheBytes = 0;
#endif
inline int64_t strip_bytes(int64_t panel) { return most(kStripBytes, kFirstCacheBytes - panel); }

// A 1x1 convolution sees one long row of pixels. Boxes are as equal as they can be, and as many as fill the threads
// evenly; where a plane is `tiled`, they are so many pixels high and wide, or a multiple, but for the last. No row is
// longer than `longest_row`.
inline Grid plan_grid(const Shape& s, int64_t bytes_per_pixel, int64_t threads, int64_t tiled,
                      int64_t longest_row = kLongest) {
  Grid g;
  const bool pointwise = s.taps() == 1;
  const int64_t image[3] = {pointwise ? 1 : s.d, pointwise ? 1 : s.h, pointwise ? s.out_pixels() : s.w};
  const int64_t kernel[3] = {s.kd, s.kh, s.kw};
  g.images = pointwise ? 1 : s.n;
  int64_t units[3];  // in these a box is measured
  for (int j = 0; j < 3; ++j) {
    g.image[j] = image[j];
    g.margin[j] = kernel[j] / 2;
    g.unit[j] = tiled > 0 && j > 0 ? tiled : kSmallTiles && pointwise && j == 2 ? kTileRows : 1;
    units[j] = ceil_div(image[j], g.unit[j]);
    g.cut(j, units[j]);
  }
  const int64_t budget = most(kCacheBytes / bytes_per_pixel, 1);
  for (int j = 2; j >= 0; --j) {  // grow along W, then H, then D, while the padded box fits
    const int64_t others = g.padded_pixels() / g.padded(j);
    const int64_t fits = most(budget / others - 2 * g.margin[j], j == 2 ? kTileRows : g.unit[j]);
    const int64_t longest = j == 2 ? least(longest_row, fits) : fits;
    g.cut(j, ceil_div(units[j], most(longest / g.unit[j], 1)));
  }
  for (int j = 0; j < 3; ++j) {  // cut further where threads would be left without equal work
    const int64_t rest = g.count() / g.parts[j];
    while (g.count() % threads != 0 && g.count() < 16 * threads && g.parts[j] < units[j]) {
      g.cut(j, least(units[j], ceil_div(ceil_div(rest * (g.parts[j] + 1), threads) * threads, rest)));
    }
  }
  return g;
}

// The pixels of a plane that are multiplied together: each row by itself, or all of them with the margins between.
struct Runs {
  int64_t count, pixels, width, padded_width, image_width;
  Runs(const Grid& g, const Box& b)
      : count(kWhole > 1 ? 1 : b.size[1]),
        pixels(kWhole > 1 ? (b.size[1] - 1) * g.padded_width(b.size[2]) + b.size[2] : b.size[2]),
        width(b.size[2]),
        padded_width(g.padded_width(width)),
        image_width(g.image[2]) {}

  // Calls f(skipped, pixel, count) for every stretch of neighbouring pixels in `rows` rows of a run from `row` on: it
  // begins after `skipped` of these rows, `pixel` pixels from the run's first.
  template <class F>
  void pieces(int64_t row, int64_t rows, F f) const {
    if (count > 1 || pixels == width) return f(0, row, rows);
    for (int64_t i = 0; i < rows;) {
      const int64_t h = (row + i) / padded_width, w = (row + i) % padded_width;
      if (w < width) f(i, h * image_width + w, least(rows - i, width - w));
      i += padded_width - w;
    }
  }
};

// From one row of results to the next.
inline int64_t result_width(const Grid& g, const Box& b) { return kWhole > 1 ? g.padded_width(b.size[2]) : b.size[2]; }
inline int64_t result_pixels(const Grid& g) { return g.box[0] * g.box[1] * (kWhole > 1 ? g.padded(2) : g.box[2]); }

inline int64_t parts_of(const Grid& g, int threads) { return least(g.count(), threads); }

}  // namespace fused_densenet::FD_ISA
