// Operands in scratch memory: what a tile of pixels needs, computed once while it is loaded.

namespace fused_densenet::FD_ISA {

constexpr int kTogether = 4;  // vectors of a pixel, whose lines are neighbours

enum class Form { relu, leaky, no_norm };

template <class T, Form F = Form::relu>
struct Activation {  // leaky((x - mean) * scale + shift), or x
  using Number = T;
  using V = Vec<Accumulate<T>>;
  static constexpr bool norm = F != Form::no_norm;
  const T* x;
  int64_t ld;
  const Accumulate<T>*mean, *scale, *shift;
  V slope;

  Activation(const Pixels& p, const NormVectors<T>& n)
      : x(static_cast<const T*>(p.data)),
        ld(p.ld),
        mean(n.mean()),
        scale(n.scale()),
        shift(n.shift()),
        slope(V::all(n.slope())) {}

  // `n` channels, whose vectors stay in registers from pixel to pixel.
  struct Column {
    const T* x;
    int64_t ld;
    V mean, scale, shift, slope;
    V centered(int64_t pixel, int n) const { return load(x + pixel * ld, n) - mean; }
    V before(V centered) const { return fma(centered, scale, shift); }
    V at(int64_t pixel, int n) const {
      if constexpr (F == Form::no_norm) return load(x + pixel * ld, n);
      const V z = before(centered(pixel, n));
      return F == Form::leaky ? leaky(z, slope) : relu(z);
    }
    V gradient(V before, V da) const {  // by what is `before` the activation
      return F == Form::leaky ? where_positive(before, da, slope * da) : where_positive(before, da);
    }
  };
  Column column(int64_t c, int n) const {
    if constexpr (F == Form::no_norm) return {x + c, ld, V::zero(), V::all(1), V::zero(), slope};
    return {x + c, ld, load(mean + c, n), load(scale + c, n), load(shift + c, n), slope};
  }
};

// Calls f(activation) with the one that x and its norm ask for.
template <class T, class Function>
void with_activation(const Pixels& x, const NormVectors<T>& norm, Function f) {
  if (!norm.given())
    f(Activation<T, Form::no_norm>(x, norm));
  else if (norm.slope() != 0)
    f(Activation<T, Form::leaky>(x, norm));
  else
    f(Activation<T>(x, norm));
}

// Offsets of `count` neighbouring pixels from `first` in a tensor of other strides; `s` has the image's sizes.
inline void pixel_offsets(const Shape& s, const int64_t* stride, int64_t first, int64_t count, int64_t* offsets) {
  int64_t w = first % s.w, h = first / s.w % s.h, d = first / (s.w * s.h) % s.d, n = first / (s.w * s.h * s.d);
  for (int64_t i = 0; i < count; ++i) {
    offsets[i] = n * stride[0] + d * stride[1] + h * stride[2] + w * stride[3];
    if (++w < s.w) continue;
    w = 0;
    if (++h < s.h) continue;
    h = 0;
    if (++d < s.d) continue;
    d = 0;
    ++n;
  }
}

// The pixels of an image that a pooled pixel averages: the first of them, and where the others are from there.
struct Windows {
  Shape pooled;
  int64_t stride[4], offset[8], count;

  explicit Windows(const Shape& s)
      : pooled{s.n, s.d / s.window_d, s.h / s.window_h, s.w / s.window_w, 1, 1, 1, s.in, s.out},
        stride{s.d * s.h * s.w, s.window_d * s.h * s.w, s.window_h * s.w, s.window_w},
        count(s.window()) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t d = i / (s.window_h * s.window_w), h = i / s.window_w % s.window_h, w = i % s.window_w;
      offset[i] = (d * s.h + h) * s.w + w;
    }
  }
  void first_pixels(int64_t first, int64_t pixels, int64_t* out) const {
    pixel_offsets(pooled, stride, first, pixels, out);
  }
  int64_t first_pixel(int64_t pixel) const {
    int64_t first;
    first_pixels(pixel, 1, &first);
    return first;
  }
};

template <class Pixel>
struct PooledActivation {  // the average of a window's activations
  using A = Accumulate<typename Pixel::Number>;
  using V = Vec<A>;
  const Pixel activation;
  const Windows& windows;
  const int64_t* first_pixels;  // of the pooled pixels from `begin` on
  int64_t begin;
  V share;

  PooledActivation(const Pixel& activation, const Windows& windows, const int64_t* first_pixels, int64_t begin)
      : activation(activation),
        windows(windows),
        first_pixels(first_pixels),
        begin(begin),
        share(V::all(A(1) / static_cast<A>(windows.count))) {}

  struct Column {
    const PooledActivation& of;
    typename Pixel::Column column;
    V at(int64_t pixel, int n) const {
      const int64_t first = of.first_pixels[pixel - of.begin];
      V sum = column.at(first, n);
      for (int64_t i = 1; i < of.windows.count; ++i) sum += column.at(first + of.windows.offset[i], n);
      return sum * of.share;
    }
  };
  Column column(int64_t c, int n) const { return {*this, activation.column(c, n)}; }
};

template <class T>
struct LoadedGradient {  // stored + (slope * (value - mean) + constant), or that of an activation by its result
  using A = Accumulate<T>;
  using V = Vec<A>;
  const T *stored, *value;
  int64_t ld_stored, ld_value;
  const A *mean, *constant, *slope;
  V negative;

  explicit LoadedGradient(const Gradient& g)
      : stored(static_cast<const T*>(g.stored.data)),
        value(static_cast<const T*>(g.value.data)),
        ld_stored(g.stored.ld),
        ld_value(g.value.ld),
        mean(static_cast<const A*>(g.mean)),
        constant(static_cast<const A*>(g.constant)),
        slope(static_cast<const A*>(g.slope)),
        negative(V::all(static_cast<A>(g.negative_slope))) {}

  struct Column {
    const T *stored, *value;
    int64_t ld_stored, ld_value;
    bool corrected;
    V mean, constant, slope, negative;
    V at(int64_t pixel, int n) const {
      const V d = load(stored + pixel * ld_stored, n);
      if (value == nullptr) return d;
      const V v = load(value + pixel * ld_value, n);
      return corrected ? d + fma(slope, v - mean, constant) : where_positive(v, d, negative * d);
    }
  };
  Column column(int64_t c, int n) const {
    const auto entries = [&](const A* p) { return p == nullptr ? V::zero() : load(p + c, n); };
    return {stored + c,        value == nullptr ? nullptr : value + c,
            ld_stored,         ld_value,
            mean != nullptr,   entries(mean),
            entries(constant), entries(slope),
            negative};
  }
};

// A box of pixels of one image: `size` of them from `begin`, and `margin` more on each side in the operands.
struct Box {
  int64_t image;
  int64_t begin[3], size[3];
};

struct Grid {  // how an image is cut into boxes
  int64_t image[3], unit[3], box[3], margin[3], parts[3], images;
  void cut(int i, int64_t count) {
    parts[i] = count;
    box[i] = least(image[i], ceil_div(ceil_div(image[i], unit[i]), count) * unit[i]);
  }
  int64_t count() const { return images * parts[0] * parts[1] * parts[2]; }
  int64_t pixels() const { return box[0] * box[1] * box[2]; }
  int64_t padded(int i) const { return i == 2 ? padded_width(box[2]) : box[i] + 2 * margin[i]; }
  // Where rows are multiplied as one with the margins between them, pairs of pixels begin anew in each.
  int64_t padded_width(int64_t size) const { return round_up(size + 2 * margin[2], kWhole > 1 ? 2 : 1); }
  int64_t padded_pixels() const { return padded(0) * padded(1) * padded(2); }
  Box at(int64_t i) const {
    Box b;
    for (int j = 2; j >= 0; --j) {
      const Range r = split(ceil_div(image[j], unit[j]), parts[j], i % parts[j]);
      b.begin[j] = r.begin * unit[j];
      b.size[j] = least(r.end * unit[j], image[j]) - b.begin[j];
      i /= parts[j];
    }
    b.image = i;
    return b;
  }
  int64_t pixel(const Box& b, int64_t d, int64_t h, int64_t w) const {  // d, h, w count from the box's first pixel
    return ((b.image * image[0] + b.begin[0] + d) * image[1] + b.begin[1] + h) * image[2] + b.begin[2] + w;
  }
};

// Which pixel of a padded box a tap reads for the box's first pixel.
inline int64_t tap_pixel(const Shape& s, int64_t tap, int64_t height, int64_t width) {
  return (tap / (s.kh * s.kw) * height + tap / s.kw % s.kh) * width + tap % s.kw;
}

// Calls row(index, first, low, high) for every row of pixels of a box with its margin: `index` rows are before it in
// scratch, its pixel i is pixel `first + i` of the batch, and pixels outside [low, high) lie outside the image.
template <class F>
void for_each_row(const Grid& g, const Box& b, bool with_margin, F row) {
  int64_t m[3];
  for (int j = 0; j < 3; ++j) m[j] = with_margin ? g.margin[j] : 0;
  const int64_t width = b.size[2] + 2 * m[2];
  int64_t index = 0;
  for (int64_t d = -m[0]; d < b.size[0] + m[0]; ++d) {
    const bool d_inside = b.begin[0] + d >= 0 && b.begin[0] + d < g.image[0];
    for (int64_t h = -m[1]; h < b.size[1] + m[1]; ++h, ++index) {
      const bool inside = d_inside && b.begin[1] + h >= 0 && b.begin[1] + h < g.image[1];
      const int64_t low = inside ? most(0, m[2] - b.begin[2]) : 0;
      const int64_t high = inside ? least(width, g.image[2] - b.begin[2] + m[2]) : 0;
      row(index, g.pixel(b, d, h, -m[2]), low, high);
    }
  }
}

template <class P, class S>
struct Fill;

// One number an element.
template <class A, class S>
struct Fill<Plain<A>, S> {
  using V = Vec<A>;
  // `count` channels from `c` of `width` pixels; out[pixel][kBlock].
  static void by_channel(const S& s, int64_t first, int64_t low, int64_t high, int64_t width, int64_t c, int64_t count,
                         A* out) {
    int64_t j = 0;
    for (; j + kTogether * V::size <= count; j += kTogether * V::size) {
      const auto column = [&](int v) { return s.column(c + j + v * V::size, V::size); };
      const decltype(column(0)) columns[kTogether] = {column(0), column(1), column(2), column(3)};
      for (int64_t i = low; i < high; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kTogether; ++v)
          store(out + i * kBlock + j + v * V::size, columns[v].at(first + i, V::size));
      }
    }
    for (; j < count; j += V::size) {
      const int n = static_cast<int>(least(V::size, count - j));
      const auto column = s.column(c + j, n);
      const auto pixels = [&](int lanes) {  // a constant for whole vectors
        for (int64_t i = low; i < high; ++i) store(out + i * kBlock + j, column.at(first + i, lanes));
      };
      n == V::size ? pixels(V::size) : pixels(n);
    }
    for (int64_t i = 0; i < width; ++i) {
      if (i >= low && i < high) i = high;
      if (i == width) break;
      for (int64_t j = 0; j < count; j += V::size) store(out + i * kBlock + j, V::zero());
    }
  }
  static void by_pixel(const S& s, int64_t first, int64_t low, int64_t high, int64_t width, int64_t c, int64_t count,
                       A* out) {
    by_channel(s, first, low, high, width, c, count, out);
  }
};

#if defined(FD_PAIRED)
// Two numbers an element: neighbouring channels, or the same channel of a pixel and the next.
template <class S>
struct Fill<Paired, S> {
  static constexpr int size = VecF::size;
  static void by_channel(const S& s, int64_t first, int64_t low, int64_t high, int64_t width, int64_t c, int64_t count,
                         uint32_t* out) {
    for (int64_t j = 0; j < count; j += 2 * size) {
      const int n = static_cast<int>(least(2 * size, count - j)), left = n < size ? n : size, right = n - left;
      const auto a = s.column(c + j, left), b = s.column(c + j + left, right);
      const auto pixels = [&](int left, int right) {  // constants for whole vectors
        for (int64_t i = low; i < high; ++i) {
          const VecF beside = right > 0 ? b.at(first + i, right) : VecF::zero();
          store(out + i * kBlock + j / 2, pair_channels(a.at(first + i, left), beside));
        }
      };
      n == 2 * size ? pixels(size, size) : pixels(left, right);
    }
    for (int64_t i = 0; i < width; ++i) {
      if (i >= low && i < high) i = high;
      if (i == width) break;
      for (int64_t j = 0; j < count; j += 2 * size) store(out + i * kBlock + j / 2, Pairs::zero());
    }
  }
  static void by_pixel(const S& s, int64_t first, int64_t low, int64_t high, int64_t width, int64_t c, int64_t count,
                       uint32_t* out) {
    for (int64_t j = 0; j < count; j += size) {
      const int n = static_cast<int>(least(size, count - j));
      const auto column = s.column(c + j, n);
      const auto pixels = [&](int lanes) {  // a constant for whole vectors
        VecF a = low == 0 && high > 0 ? column.at(first, lanes) : VecF::zero();
        for (int64_t i = 0; i < width; ++i) {
          const int64_t next = i + 1;
          const VecF b = next >= low && next < high ? column.at(first + next, lanes) : VecF::zero();
          store(out + i * kBlock + j, pair_pixels(a, b));
          a = b;
        }
      };
      n == size ? pixels(size) : pixels(n);
    }
  }
  // Pixels 0 and 1, 2 and 3, ... of a row, nothing beside the last of an odd number.
  static void pairs_of_pixels(const S& s, int64_t first, int64_t width, int64_t c, int64_t count, uint32_t* out) {
    for (int64_t j = 0; j < count; j += size) {
      const int n = static_cast<int>(least(size, count - j));
      const auto column = s.column(c + j, n);
      for (int64_t i = 0; i < width; i += 2) {
        const VecF b = i + 1 < width ? column.at(first + i + 1, n) : VecF::zero();
        store(out + i / 2 * kBlock + j, pair_pixels(column.at(first + i, n), b));
      }
    }
  }
#if defined(FD_AMX)
  // `pairs` pairs of up to 16 channels as registers of A: of `height` rows that begin `image_width` pixels apart, as if
  // `padded_width` pixels apart with zeros between and behind them.
  static void transposed_pairs(const S& s, int64_t first, int64_t image_width, int64_t height, int64_t width,
                               int64_t padded_width, int64_t pairs, int64_t c, int n, uint32_t* out) {
    int64_t w = 0, h = 0;
    const auto column = s.column(c, n);
    for (int64_t begin = 0; begin < pairs; begin += kWhole, out += kWhole * kWhole) {
      VecF rows[kWhole];
      for (int i = 0; i < kWhole; ++i) {
        const bool inside = h < height && w < width;
        const int64_t pixel = first + h * image_width + w;
        const VecF a = inside ? column.at(pixel, n) : VecF::zero();
        const VecF b = inside && w + 1 < width ? column.at(pixel + 1, n) : VecF::zero();
        rows[i] = {_mm512_castsi512_ps(pair_pixels(a, b).v)};
        w += 2;
        if (w >= padded_width) w = 0, ++h;
      }
      transpose(rows);
      for (int i = 0; i < kWhole; ++i) _mm512_storeu_ps(out + kWhole * i, rows[i].v);
    }
  }
#endif
};
#endif

}  // namespace fused_densenet::FD_ISA
