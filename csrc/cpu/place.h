// An image of any strides into channels-last pixels, with moments; and a loaded gradient back out.

namespace fused_densenet::FD_ISA {

// Runs of kRun pixels over the whole batch, each with the offsets of its pixels in a tensor of other strides.
constexpr int64_t kRun = 256;

template <class T>
class PlaceKernel {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  PlaceKernel(const Place& f, void* workspace, int threads)
      : f_(f), runs_(ceil_div(f.shape.pixels(), kRun)), parts_(least(runs_, threads)) {
    Arena arena(workspace);
    partial_ = arena.take<A>(2 * runs_ * f.shape.out);
    offsets_ = arena.take<int64_t>(parts_ * kRun);
    numbers_ = arena.take<A>(parts_ * kRun * kBlock);
    bytes_ = arena.used();
  }

  size_t workspace() const { return bytes_; }

  void run(const Parallel& parallel) const {
    parallel_for(parallel, parts_, [&](int64_t part) {
      const Range runs = split(runs_, parts_, part);
      for (int64_t i = runs.begin; i < runs.end; ++i) one(i, offsets_ + part * kRun, numbers_ + part * kRun * kBlock);
    });
    if (f_.moments.mean == nullptr) return;
    merge_moments(partial_, runs_, f_.shape.out, [&](int64_t i) { return count(i); }, f_.moments, parallel);
  }

 private:
  int64_t count(int64_t i) const { return least(kRun, f_.shape.pixels() - i * kRun); }

  void one(int64_t i, int64_t* offsets, A* numbers) const {
    const T* x = static_cast<const T*>(f_.x.data);
    const int64_t step = f_.x.stride[4], pixels = count(i);
    pixel_offsets(f_.shape, f_.x.stride, i * kRun, pixels, offsets);
    for (int64_t c = 0; c < f_.shape.out; c += kBlock) {
      const int64_t channels = least(kBlock, f_.shape.out - c);
      if (step == 1) {
        for (int64_t p = 0; p < pixels; ++p) {
          for (int64_t j = 0; j < channels; j += V::size) {
            store(numbers + p * kBlock + j, load(x + offsets[p] + c + j, static_cast<int>(channels - j)));
          }
        }
      } else {
        for (int64_t j = 0; j < ceil_div(channels, V::size) * V::size; ++j) {
          for (int64_t p = 0; p < pixels; ++p) {
            numbers[p * kBlock + j] = j < channels ? as_number(x + offsets[p] + (c + j) * step) : A(0);
          }
        }
      }
      const bool wanted = f_.moments.mean != nullptr;
      A* mean = wanted ? partial_ + 2 * i * f_.shape.out + c : nullptr;
      A* m2 = wanted ? mean + f_.shape.out : nullptr;
      A rest[kBlock];
      int64_t seen[kBlock / Output<T>::columns];
      T* out = f_.out.data == nullptr ? nullptr : static_cast<T*>(f_.out.data) + c;
      Output<T> output(out, f_.out.ld, channels, mean, m2, rest, seen);
      for (int64_t j = 0; j < channels; j += Output<T>::columns) {
        output.store_rows(numbers + j, kBlock, i * kRun, pixels, j);
      }
    }
  }

  const Place& f_;
  int64_t runs_, parts_;
  A *partial_, *numbers_;
  int64_t* offsets_;
  size_t bytes_;
};

template <class T>
class PlaceBackwardKernel {
  using A = Accumulate<T>;
  using V = Vec<A>;

 public:
  PlaceBackwardKernel(const PlaceBackward& f, void* workspace, int threads)
      : f_(f), runs_(ceil_div(f.shape.pixels(), kRun)), parts_(least(runs_, threads)) {
    Arena arena(workspace);
    offsets_ = arena.take<int64_t>(parts_ * kRun);
    numbers_ = arena.take<T>(parts_ * kRun * kBlock);
    bytes_ = arena.used();
  }

  size_t workspace() const { return bytes_; }

  void run(const Parallel& parallel) const {
    parallel_for(parallel, parts_, [&](int64_t part) {
      const Range runs = split(runs_, parts_, part);
      for (int64_t i = runs.begin; i < runs.end; ++i) one(i, offsets_ + part * kRun, numbers_ + part * kRun * kBlock);
    });
  }

 private:
  void one(int64_t i, int64_t* offsets, T* numbers) const {
    const LoadedGradient<T> gradient(f_.grad);
    T* out = static_cast<T*>(f_.out.data);
    const int64_t step = f_.out.stride[4], pixels = least(kRun, f_.shape.pixels() - i * kRun);
    pixel_offsets(f_.shape, f_.out.stride, i * kRun, pixels, offsets);
    for (int64_t c = 0; c < f_.shape.out; c += kBlock) {
      const int64_t channels = least(kBlock, f_.shape.out - c);
      for (int64_t p = 0; p < pixels; ++p) {
        T* to = step == 1 ? out + offsets[p] + c : numbers + p * kBlock;
        for (int64_t j = 0; j < channels; j += V::size) {
          const int n = static_cast<int>(least(V::size, channels - j));
          store(to + j, gradient.column(c + j, n).at(i * kRun + p, n), n);
        }
      }
      if (step == 1) continue;
      for (int64_t j = 0; j < channels; ++j) {
        for (int64_t p = 0; p < pixels; ++p) out[offsets[p] + (c + j) * step] = numbers[p * kBlock + j];
      }
    }
  }

  const PlaceBackward& f_;
  int64_t runs_, parts_;
  T* numbers_;
  int64_t* offsets_;
  size_t bytes_;
};

}  // namespace fused_densenet::FD_ISA
