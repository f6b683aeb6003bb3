// Batch normalisation around a kernel: its affine map made before the pixels are read, and what it is owed settled
// after they were summed.

namespace fused_densenet::FD_ISA {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// (x - mean) * scale + shift; `scale` and `shift` are made once for each call.
template <class T>
class NormVectors {
 public:
  using A = Accumulate<T>;

  NormVectors(const Norm& norm, int64_t channels, Arena& arena)
      : norm_(norm),
        channels_(norm.given() ? channels : 0),
        scale_(arena.take<A>(channels_)),
        shift_(arena.take<A>(channels_)) {}

  void make() const {
    const A eps = static_cast<A>(norm_.eps);
    for (int64_t c = 0; c < channels_; ++c) {
      scale_[c] = affine(norm_.weight, c) / square_root(static_cast<const A*>(norm_.var)[c] + eps);
      shift_[c] = affine(norm_.bias, c);
    }
  }

  bool given() const { return norm_.given(); }
  A slope() const { return static_cast<A>(norm_.negative_slope); }
  const A* mean() const { return static_cast<const A*>(norm_.mean); }
  const A* scale() const { return scale_; }
  const A* shift() const { return shift_; }
  double deviation(int64_t c) const {
    return square_root(static_cast<double>(static_cast<const A*>(norm_.var)[c]) + norm_.eps);
  }
  // An entry of the gradient of weight or bias.
  void store_affine(void* gradient, int64_t c, double x) const {
    if (norm_.narrow)
      store_number(static_cast<T*>(gradient) + c, static_cast<A>(x));
    else
      static_cast<A*>(gradient)[c] = static_cast<A>(x);
  }

 private:
  A affine(const void* p, int64_t c) const {
    return norm_.narrow ? as_number(static_cast<const T*>(p) + c) : static_cast<const A*>(p)[c];
  }

  const Norm& norm_;
  int64_t channels_;
  A *scale_, *shift_;
};

// A bias as numbers of the accumulation type; zeros where there is none.
template <class T>
void read_bias(const Bias& bias, int64_t channels, Accumulate<T>* out) {
  using A = Accumulate<T>;
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = bias.data == nullptr ? A(0)
             : bias.narrow        ? as_number(static_cast<const T*>(bias.data) + c)
                                  : static_cast<const A*>(bias.data)[c];
  }
}

// Partial sums [tile][channels] of the gradient to that of a bias.
template <class T>
void write_dbias(const Accumulate<T>* partial, int64_t tiles, int64_t channels, const Bias& dbias) {
  using A = Accumulate<T>;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += static_cast<double>(partial[t * channels + c]);
    if (dbias.narrow)
      store_number(static_cast<T*>(dbias.data) + c, static_cast<A>(sum));
    else
      static_cast<A*>(dbias.data)[c] = static_cast<A>(sum);
  }
}

// Partial sums [tile][2][channels] of dz and dz * (x - mean) to what the norm is owed, of statistics of `pixels`
// values.
template <class T>
void settle(const Accumulate<T>* partial, int64_t tiles, int64_t channels, const NormVectors<T>& norm, const Owed& owed,
            int64_t pixels, bool accumulate, const Parallel& parallel) {
  using A = Accumulate<T>;
  constexpr int64_t width = 32;
  const double count = owed.pixels == nullptr ? static_cast<double>(pixels) : *static_cast<const A*>(owed.pixels);
  parallel_for(parallel, ceil_div(channels, width), [&](int64_t task) {
    const int64_t begin = task * width, lanes = least(width, channels - begin);
    double sums[2][width] = {};
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t s = 0; s < 2; ++s) {
        const A* p = partial + (2 * t + s) * channels + begin;
        for (int64_t j = 0; j < lanes; ++j) sums[s][j] += static_cast<double>(p[j]);
      }
    }
    for (int64_t j = 0; j < lanes; ++j) {
      const int64_t c = begin + j;
      const double rstd = 1 / norm.deviation(c);
      norm.store_affine(owed.dbias, c, sums[0][j]);
      norm.store_affine(owed.dweight, c, sums[1][j] * rstd);
      if (owed.constant == nullptr) continue;
      const double share = static_cast<double>(norm.scale()[c]) / count;
      const double debts[2] = {share * sums[0][j], share * sums[1][j] * rstd * rstd};
      A* const to[2] = {static_cast<A*>(owed.constant) + c, static_cast<A*>(owed.slope) + c};
      for (int s = 0; s < 2; ++s) *to[s] = (accumulate ? *to[s] : A(0)) - static_cast<A>(debts[s]);
    }
  });
}

}  // namespace fused_densenet::FD_ISA
