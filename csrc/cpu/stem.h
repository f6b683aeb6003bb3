// Activations: leaky(norm(x)), or a stem's: of relu(norm(x)) the maxima over windows of 3, stride 2, one pixel of
// padding; and the gradient back, for which the activations and the places of the maxima are computed again.

namespace fused_densenet::FD_ISA {

// The pixels of one dimension that a window reads.
inline Range window_of(int64_t out, int64_t size) { return {most(2 * out - 1, 0), least(2 * out + 2, size)}; }

struct Maxima {  // sizes of the image, and of the image of its windows' maxima
  int64_t size[3], out[3];
  explicit Maxima(const Shape& s, bool pools) : size{s.d, s.h, s.w} {
    for (int j = 0; j < 3; ++j) out[j] = pools ? (size[j] + 1) / 2 : size[j];
  }
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
  // Calls f(pixel) for every pixel of the image that a window reads, in the order of memory.
  template <class F>
  void for_each_pixel(int64_t out_pixel, F f) const {
    const Range w = window_of(out_pixel % out[2], size[2]);
    const Range h = window_of(out_pixel / out[2] % out[1], size[1]);
    const Range d = window_of(out_pixel / (out[2] * out[1]), size[0]);
    for (int64_t i = d.begin; i < d.end; ++i) {
      for (int64_t j = h.begin; j < h.end; ++j) {
        for (int64_t k = w.begin; k < w.end; ++k) f((i * size[1] + j) * size[2] + k);
      }
    }
  }
};

// Maxima so far, of activations, which are not negative: -1 where there was none. The first of equals stays, and a NaN.
template <class A>
struct Largest {
  alignas(64) A value[kBlock];

  Largest() {
    for (int j = 0; j < kBlock; ++j) value[j] = -1;
  }
  void add(const A* a) {
    for (int j = 0; j < kBlock; ++j) value[j] = int(a[j] > value[j]) | int(a[j] != a[j]) ? a[j] : value[j];
  }
  // And in `place` the number of the one that is largest.
  void add(const A* a, A number, A* place) {
    for (int j = 0; j < kBlock; ++j) {
      const bool larger = int(a[j] > value[j]) | int(a[j] != a[j]);
      value[j] = larger ? a[j] : value[j];
      place[j] = larger ? number : place[j];
    }
  }
};

template <class T>
class NormReluPoolKernel {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  NormReluPoolKernel(const NormReluPool& f, void* workspace, int)
      : f_(f), arena_(workspace), norm_(f.norm, f.shape.in, arena_), image_(f.shape, f.pools) {}
  size_t workspace() const { return arena_.used(); }

  void run(const Parallel& parallel) const {
    norm_.make();
    const int64_t rows = f_.shape.n * image_.out[0] * image_.out[1];
    with_activation<T>(f_.x, norm_, [&](const auto& activation) {
      parallel_for(parallel, rows, [&](int64_t row) {
        for (int64_t w = 0; w < image_.out[2]; ++w) one(activation, row * image_.out[2] + w);
      });
    });
  }

 private:
  template <class Pixel>
  void one(const Pixel& activation, int64_t out_pixel) const {
    T* out = static_cast<T*>(f_.out.data) + out_pixel * f_.out.ld;
    const int64_t first = out_pixel / image_.out_pixels() * image_.pixels();
    alignas(64) A a[kBlock] = {};
    for (int64_t c = 0; c < f_.shape.in; c += kBlock) {
      const int64_t channels = least(kBlock, f_.shape.in - c);
      const auto read = [&](int64_t pixel) {
        for (int64_t j = 0; j < channels; j += V::size) {
          store(a + j,
                activation.column(c + j, static_cast<int>(channels - j)).at(pixel, static_cast<int>(channels - j)));
        }
      };
      Largest<A> largest;
      if (f_.pools) {
        image_.for_each_pixel(out_pixel % image_.out_pixels(), [&](int64_t pixel) {
          read(first + pixel);
          largest.add(a);
        });
      } else {
        read(out_pixel);
      }
      const A* from = f_.pools ? largest.value : a;
      for (int64_t j = 0; j < channels; j += V::size) {
        store(out + c + j, load(from + j), static_cast<int>(least(V::size, channels - j)));
      }
    }
  }

  const NormReluPool& f_;
  Arena arena_;
  NormVectors<T> norm_;
  Maxima image_;
};

// Sums of at most kChain pixels are added to those of an image's pixels before them.
template <class T>
class NormReluMeanKernel {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  NormReluMeanKernel(const NormReluMean& f, void* workspace, int)
      : f_(f), arena_(workspace), norm_(f.norm, f.shape.in, arena_) {}
  size_t workspace() const { return arena_.used(); }

  void run(const Parallel& parallel) const {
    norm_.make();
    const int64_t blocks = ceil_div(f_.shape.in, kBlock);
    with_activation<T>(f_.x, norm_, [&](const auto& activation) {
      parallel_for(parallel, f_.shape.n * blocks, [&](int64_t i) {
        const int64_t begin = i % blocks * kBlock, end = least(begin + kBlock, f_.shape.in);
        for (int64_t c = begin; c < end; c += V::size) {
          mean(activation, i / blocks, c, static_cast<int>(least(V::size, end - c)));
        }
      });
    });
  }

 private:
  template <class Pixel>
  void mean(const Pixel& activation, int64_t n, int64_t c, int lanes) const {
    const int64_t pixels = f_.shape.d * f_.shape.h * f_.shape.w;
    const auto column = activation.column(c, lanes);
    V sum = V::zero();
    for (int64_t begin = 0; begin < pixels; begin += kChain) {
      V chain = V::zero();
      const int64_t end = least(begin + kChain, pixels);
      for (int64_t i = begin; i < end; ++i) chain += column.at(n * pixels + i, lanes);
      sum += chain;
    }
    const V share = V::all(A(1) / static_cast<A>(pixels));
    store(static_cast<T*>(f_.out.data) + n * f_.out.ld + c, sum * share, lanes);
  }

  const NormReluMean& f_;
  Arena arena_;
  NormVectors<T> norm_;
};

// Windows overlap: all pixels of an image, for some channels, are one task. A pixel's gradients are added in scratch
// memory, in the accumulation type, in a ring of three rows (planes of a volume): a row of windows reads three, and the
// next one the last of them again.
template <class T>
class NormReluPoolBackwardKernel {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  NormReluPoolBackwardKernel(const NormReluPoolBackward& f, void* workspace, int threads)
      : f_(f),
        arena_(workspace),
        norm_(f.norm, f.shape.in, arena_),
        image_(f.shape, f.pools),
        outer_(image_.size[0] > 1 ? 0 : 1),
        row_(image_.pixels() / image_.size[outer_]),
        block_(kBlock),
        partial_(arena_.take<A>(2 * f.shape.n * f.shape.in)) {
    while (block_ > V::size && f.shape.n * ceil_div(f.shape.in, block_) % threads != 0) block_ /= 2;
    tasks_ = f.shape.n * ceil_div(f.shape.in, block_);
    parts_ = least(tasks_, threads);
    rings_ = arena_.take<A>(f.pools ? parts_ * kRing * row_ * kBlock : 0);
  }
  size_t workspace() const { return arena_.used(); }

  void run(const Parallel& parallel) const {
    norm_.make();
    const int64_t blocks = tasks_ / f_.shape.n;
    with_activation<T>(f_.x, norm_, [&](const auto& activation) {
      parallel_for(parallel, parts_, [&](int64_t part) {
        const Range tasks = split(tasks_, parts_, part);
        for (int64_t task = tasks.begin; task < tasks.end; ++task) {
          const int64_t c = task % blocks * block_;
          one(activation, task / blocks, c, least(block_, f_.shape.in - c), rings_ + part * kRing * row_ * kBlock);
        }
      });
    });
    settle(partial_, f_.shape.n, f_.shape.in, norm_, f_.owed, f_.shape.pixels(), false, parallel);
  }

 private:
  static constexpr int64_t kRing = 3;

  template <class Pixel>
  void one(const Pixel& activation, int64_t n, int64_t c, int64_t channels, A* ring) const {
    const int64_t first = n * image_.pixels();
    const T* grad = static_cast<const T*>(f_.grad.data) + n * image_.out_pixels() * f_.grad.ld + c;
    alignas(64) A sums[2][kBlock] = {};
    if (!f_.pools) {
      finish(activation, first, image_.pixels(), c, channels, sums,
             [&](int64_t i, int64_t j, int lanes, const auto& column, V pre) {
               return column.gradient(pre, load(grad + i * f_.grad.ld + j, lanes));
             });
    } else {
      std::memset(ring, 0, static_cast<size_t>(kRing * row_ * kBlock) * sizeof(A));
      const int64_t rows = image_.out[outer_], width = image_.out_pixels() / rows;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = row * width; i < (row + 1) * width; ++i) {
          back(activation, grad + i * f_.grad.ld, first, i, c, channels, ring);
        }
        const int64_t end = row + 1 == rows ? image_.size[outer_] : 2 * row + 1;
        for (int64_t done = most(2 * row - 1, 0); done < end; ++done) {
          A* at = ring + done % kRing * row_ * kBlock;
          finish(activation, first + done * row_, row_, c, channels, sums,
                 [&](int64_t i, int64_t j, int, const auto&, V) { return load(at + i * kBlock + j); });
          std::memset(at, 0, static_cast<size_t>(row_ * kBlock) * sizeof(A));
        }
      }
    }
    for (int64_t j = 0; j < channels; j += V::size) {
      A* to = partial_ + 2 * n * f_.shape.in + c + j;
      const int lanes = static_cast<int>(least(V::size, channels - j));
      for (int64_t s = 0; s < 2; ++s) store(to + s * f_.shape.in, load(sums[s] + j), lanes);
    }
  }

  // Stores and sums the gradients of `count` pixels from pixel `first` of the batch: dz(i, j, lanes, column, pre) of
  // the i-th of them, for channels from j on, whose number before the activation is `pre`.
  template <class Pixel, class F>
  void finish(const Pixel& activation, int64_t first, int64_t count, int64_t c, int64_t channels, A (&sums)[2][kBlock],
              F dz_of) const {
    for (int64_t j = 0; j < channels; j += V::size) {
      const int lanes = static_cast<int>(least(V::size, channels - j));
      const auto column = activation.column(c + j, lanes);
      V sum = load(sums[0] + j), sum_centered = load(sums[1] + j);
      T* p = static_cast<T*>(f_.dx.data) + first * f_.dx.ld + c + j;
      for (int64_t i = 0; i < count; ++i, p += f_.dx.ld) {
        const V centered = column.centered(first + i, lanes);
        const V dz = dz_of(i, j, lanes, column, column.before(centered));
        sum += dz;
        sum_centered = fma(dz, centered, sum_centered);
        store(p, column.scale * dz, lanes);
      }
      store(sums[0] + j, sum);
      store(sums[1] + j, sum_centered);
    }
  }

  // Adds a maximum's gradient where the maximum was, unless ReLU was not open there.
  template <class Pixel>
  void back(const Pixel& activation, const T* grad, int64_t first, int64_t out_pixel, int64_t c, int64_t channels,
            A* ring) const {
    alignas(64) A place[kBlock] = {}, a[kBlock] = {};
    Largest<A> largest;
    A number = 0;
    image_.for_each_pixel(out_pixel, [&](int64_t pixel) {
      for (int64_t j = 0; j < channels; j += V::size) {
        store(
            a + j,
            activation.column(c + j, static_cast<int>(channels - j)).at(first + pixel, static_cast<int>(channels - j)));
      }
      largest.add(a, number, place);
      number += 1;
    });
    for (int j = 0; j < kBlock; ++j) place[j] = largest.value[j] <= 0 ? A(-1) : place[j];
    number = 0;
    image_.for_each_pixel(out_pixel, [&](int64_t pixel) {
      A* p = ring + (pixel / row_ % kRing * row_ + pixel % row_) * kBlock;
      for (int j = 0; j < kBlock; ++j) a[j] = place[j] == number ? A(1) : A(0);
      for (int64_t j = 0; j < channels; j += V::size) {
        const int n = static_cast<int>(least(V::size, channels - j));
        store(p + j, load(p + j) + where_positive(load(a + j), load(grad + j, n)));
      }
      number += 1;
    });
  }

  const NormReluPoolBackward& f_;
  Arena arena_;
  NormVectors<T> norm_;
  Maxima image_;
  int outer_;  // dimension
  int64_t row_, block_, tasks_, parts_;
  A *partial_, *rings_;
};

}  // namespace fused_densenet::FD_ISA
