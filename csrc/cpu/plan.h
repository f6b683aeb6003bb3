// How a convolution is cut: boxes of pixels whose operands fit in a core's cache, and the workspace they need.

namespace fused_densenet::FD_ISA {

constexpr int64_t kCacheBytes = 384 << 10;  // of a core's second-level cache, for the operands of one box

// A 1x1 convolution sees one long row of pixels. Boxes are as equal as they can be, and as many as fill the threads
// evenly.
inline Grid plan_grid(const Shape& s, int64_t bytes_per_pixel, int64_t threads) {
  Grid g;
  const bool pointwise = s.taps() == 1;
  const int64_t image[3] = {pointwise ? 1 : s.d, pointwise ? 1 : s.h, pointwise ? s.pixels() : s.w};
  const int64_t kernel[3] = {s.kd, s.kh, s.kw};
  g.images = pointwise ? 1 : s.n;
  for (int j = 0; j < 3; ++j) {
    g.image[j] = image[j];
    g.margin[j] = kernel[j] / 2;
    g.box[j] = 1;
    g.parts[j] = image[j];
  }
  const int64_t budget = most(kCacheBytes / bytes_per_pixel, 1);
  for (int j = 2; j >= 0; --j) {  // grow along W, then H, then D, while the padded box fits
    const int64_t longest = j == 2 ? 8 * kTileRows : image[j];
    const int64_t others = g.padded_pixels() / g.padded(j);
    const int64_t fits = most(budget / others - 2 * g.margin[j], j == 2 ? kTileRows : 1);
    g.parts[j] = ceil_div(image[j], least(longest, fits));
    g.box[j] = ceil_div(image[j], g.parts[j]);
  }
  for (int j = 0; j < 3; ++j) {  // cut further where threads would be left without equal work
    const int64_t rest = g.count() / g.parts[j];
    while (g.count() % threads != 0 && g.count() < 4 * threads && g.parts[j] < image[j]) {
      g.parts[j] = least(image[j], ceil_div(ceil_div(rest * (g.parts[j] + 1), threads) * threads, rest));
    }
    g.box[j] = ceil_div(image[j], g.parts[j]);
  }
  return g;
}

// Hands out aligned pieces of a workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class E>
  E* take(int64_t count) {
    E* p = reinterpret_cast<E*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

inline int64_t parts_of(const Grid& g, int threads) { return least(g.count(), threads); }

}  // namespace fused_densenet::FD_ISA
