// im2col: what a convolution of any stride reads for a pixel, its kernel's pixels one after the other, as a row of an
// operand.

namespace fused_densenet::FD_ISA {

template <class T, class P>
class Im2col {
  using E = typename P::Element;
  static constexpr int64_t kNumbers = kBlock * P::pair;  // of a block of a row

 public:
  explicit Im2col(const StridedConv& f)
      : f_(f),
        x_(static_cast<const T*>(f.x.data)),
        channels_(f.shape.in / (f.kernel[0] * f.kernel[1] * f.kernel[2])),
        dense_(f.x.ld == channels_) {}

  // Blocks `blocks` of what `count` pixels from `first` on read; zeros up to the last of `elements` of a row.
  void load(int64_t first, int64_t count, Range blocks, int64_t elements, E* out, int64_t block_size) const {
    const Range kept{blocks.begin * kNumbers, least(blocks.end, ceil_div(elements, kBlock)) * kNumbers};
    const int64_t width = f_.shape.w;
    // Of a row of pixels those whose kernel lies inside of the image's width.
    const int64_t low = dense_ ? least(width, ceil_div(f_.padding[2], f_.stride[2])) : width;
    const int64_t high = dense_ ? most(0, f_.size[2] + f_.padding[2] - f_.kernel[2] + f_.stride[2]) / f_.stride[2] : 0;
    for (int64_t i = 0, n; i < count; i += n) {
      const int64_t w = (first + i) % width;
      n = w >= low && w < high ? least(count - i, least(width, high) - w) : 1;
      Rows rows{kept, out + i * kBlock, block_size, n, f_.stride[2] * channels_};
      pixels((first + i) / width, w, rows);
      rows.take(nullptr, elements * P::pair - f_.shape.in);
    }
  }

 private:
  // Takes the numbers of `count` rows in order, and keeps those `kept`. What a row reads lies `step` behind what the
  // row before it does.
  struct Rows {
    Range kept;
    E* out;
    int64_t block_size, count, step, next = 0;

    // `length` numbers of `from`; zeros where that is null.
    void take(const T* from, int64_t length) {
      const int64_t end = least(next + length, kept.end);
      for (int64_t n, j = most(next, kept.begin); j < end; j += n) {
        const int64_t i = j - kept.begin, in_block = i % kNumbers;
        n = least(end - j, least(kAtOnce, kNumbers - in_block));
        write(out + i / kNumbers * block_size, in_block, from == nullptr ? nullptr : from + (j - next), n);
      }
      next += length;
    }

   private:
    static constexpr int64_t kAtOnce = Vec<typename P::Acc>::size;

    void write(E* block, int64_t i, const T* from, int64_t n) const {
      const auto each = [&](int lanes) {  // a constant for whole vectors
        for (int64_t row = 0; row < count; ++row) {
          if constexpr (P::pair == 1) {
            store(block + row * kBlock + i, from == nullptr ? Vec<E>::zero() : FD_ISA::load(from + row * step, lanes),
                  lanes);
          } else {
            T* to = reinterpret_cast<T*>(block + row * kBlock) + i;
            if (from == nullptr)
              std::memset(static_cast<void*>(to), 0, lanes * sizeof(T));
            else
              copy_16_bits(to, from + row * step, lanes);
          }
        }
      };
      n == kAtOnce ? each(kAtOnce) : each(static_cast<int>(n));
    }
  };

  // What neighbouring pixels from w of row `row` of all images on read.
  void pixels(int64_t row, int64_t w, Rows& rows) const {
    const int64_t image = row / (f_.shape.d * f_.shape.h);
    const int64_t begin[3] = {row / f_.shape.h % f_.shape.d * f_.stride[0] - f_.padding[0],
                              row % f_.shape.h * f_.stride[1] - f_.padding[1], w * f_.stride[2] - f_.padding[2]};
    const int64_t low = least(f_.kernel[2], most(0, -begin[2]));
    const int64_t high = most(low, least(f_.kernel[2], f_.size[2] - begin[2]));
    for (int64_t d = begin[0]; d < begin[0] + f_.kernel[0]; ++d) {
      for (int64_t h = begin[1]; h < begin[1] + f_.kernel[1]; ++h) {
        if (d < 0 || d >= f_.size[0] || h < 0 || h >= f_.size[1]) {
          rows.take(nullptr, f_.kernel[2] * channels_);
          continue;
        }
        const int64_t pixel = ((image * f_.size[0] + d) * f_.size[1] + h) * f_.size[2] + begin[2];
        rows.take(nullptr, low * channels_);
        if (dense_) {
          rows.take(x_ + (pixel + low) * channels_, (high - low) * channels_);
        } else {
          for (int64_t i = low; i < high; ++i) rows.take(x_ + (pixel + i) * f_.x.ld, channels_);
        }
        rows.take(nullptr, (f_.kernel[2] - high) * channels_);
      }
    }
  }

  const StridedConv& f_;
  const T* x_;
  int64_t channels_;
  bool dense_;
};

}  // namespace fused_densenet::FD_ISA
