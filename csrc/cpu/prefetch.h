// What is read next, on its way while something else is computed.

namespace fused_densenet::FD_ISA {

// Lines that a tile fetches while it multiplies, where its vectors are lines of the cache themselves: one for each
// element of the reduction, the last one over and over. Elsewhere they are fetched between two chains of a tile.
constexpr bool kFetches = Vec<float>::size * sizeof(float) == 64;
struct Lines {
  const char *const *next, *const *last;
};

// Fetches rows of memory into the second-level cache, a few lines at a time: a core waits for no more than some ten of
// them at once, so that they are best spread over what is computed meanwhile.
class Prefetch {
 public:
  // `rows` rows of `bytes` from `first`, `stride` bytes apart.
  void add(const void* first, int64_t rows, int64_t bytes, int64_t stride) {
    if (streams_ == kStreams || rows == 0) return;
    streams[streams_++] = {static_cast<const char*>(first), rows, ceil_div(bytes, kLine) * kLine, stride};
    lines_ += rows * ceil_div(bytes, kLine);
  }
  // Over so much work, in elements of the reduction summed over all tiles.
  void spread(int64_t work) { rate_ = lines_ * kUnit / most(work, 1) + 1; }
  // Those that are due when so much of it was done, fetched here.
  void some(int64_t work) {
    for (due_ += work * rate_; due_ >= kUnit; due_ -= kUnit, at_ += kLine) {
      if (at_ == end_ && !next_row()) return;
      __builtin_prefetch(at_, 0, 2);
    }
  }
  // Or by a tile of so much work, before the next call.
  __attribute__((noinline)) Lines lines(int64_t work) {
    due_ += work * rate_;
    const int64_t due = least(due_ / kUnit, least(work, kAtOnce));
    due_ -= due * kUnit;
    int64_t count = 0;
    while (count < due && (at_ != end_ || next_row())) {
      for (const int64_t row = least(due, count + (end_ - at_) / kLine); count < row; at_ += kLine)
        for_tile_[count++] = at_;
    }
    if (count == 0) for_tile_[count++] = reinterpret_cast<const char*>(this);
    return {for_tile_, for_tile_ + count - 1};
  }

 private:
  static constexpr int64_t kLine = 64, kStreams = 4, kUnit = 1 << 16, kAtOnce = 256;
  struct Stream {
    const char* first;
    int64_t rows, bytes, stride;
  };

  bool next_row() {
    if (stream_ == streams_) {
      rate_ = 0;
      return false;
    }
    Stream& s = streams[stream_];
    at_ = s.first;
    end_ = at_ + s.bytes;
    s.first += s.stride;
    if (--s.rows == 0) ++stream_;
    return true;
  }

  Stream streams[kStreams];
  const char* for_tile_[kAtOnce];
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t streams_ = 0, lines_ = 0, stream_ = 0, rate_ = 0, due_ = 0;
};

}  // namespace fused_densenet::FD_ISA
