// What is read next, on its way while something else is computed.

namespace fused_densenet::FD_ISA {

// Whether a tile fetches while it multiplies, where its vectors are lines of the cache themselves: one line for each
// element of the reduction. Elsewhere lines are fetched between two chains of a tile.
constexpr bool kFetches = Vec<float>::size * sizeof(float) == 64;
constexpr int64_t kLine = 64;

// Lines of the cache from `at` on, in rows of `of_row`, `jump` bytes from the end of one to the next; `in_row` are left
// of the first row, and `due` are to be fetched.
struct Lines {
  const char* at;
  int64_t of_row, jump, in_row, due;

  // In registers and without a branch: a list of lines, made before, costs a tile up to a tenth of its time. Once none
  // is due, the same line over and over.
  __attribute__((always_inline)) void fetch() {
    __builtin_prefetch(at, 0, 2);
    const int64_t one = due > 0;
    due -= one;
    in_row -= one;
    const int64_t row_ends = (in_row - 1) >> 63;  // all bits, or none
    at += one * kLine + (jump & row_ends);
    in_row += of_row & row_ends;
  }
};

// Fetches rows of memory into the second-level cache, a few lines at a time: a core waits for no more than some ten of
// them at once, so that they are best spread over what is computed meanwhile.
class Prefetch {
 public:
  // `rows` rows of `bytes` from `first`, `stride` bytes apart.
  void add(const void* first, int64_t rows, int64_t bytes, int64_t stride) {
    if (streams_ == kStreams || rows == 0) return;
    const int64_t of_row = ceil_div(bytes, kLine);
    streams[streams_++] = {{static_cast<const char*>(first), of_row, stride - of_row * kLine, of_row, 0},
                           rows * of_row};
    all_ += rows * of_row;
  }
  // Over so much work, in elements of the reduction summed over all tiles.
  void spread(int64_t work) { rate_ = all_ * kUnit / most(work, 1) + 1; }
  // Those that are due when so much of it was done, at most one for each element; the caller says when they are.
  Lines due(int64_t work) { return due(work, work); }
  void fetched(const Lines& lines) { current_.lines = lines; }
  // Or fetched here, all that are due.
  void some(int64_t work) {
    Lines lines = due(work, all_);
    while (lines.due > 0) lines.fetch();
    fetched(lines);
  }

 private:
  static constexpr int64_t kStreams = 4, kUnit = 1 << 16;
  struct Stream {
    Lines lines;
    int64_t left;
  };

  Lines due(int64_t work, int64_t at_once) {
    due_ += work * rate_;
    if (current_.left == 0) next_stream();
    current_.lines.due = least(least(due_ / kUnit, at_once), current_.left);
    due_ -= current_.lines.due * kUnit;
    current_.left -= current_.lines.due;
    return current_.lines;
  }

  void next_stream() {
    if (stream_ < streams_)
      current_ = streams[stream_++];
    else
      rate_ = 0;
  }

  Stream streams[kStreams];
  Stream current_{{reinterpret_cast<const char*>(this), 1, 0, 1, 0}, 0};
  int64_t streams_ = 0, stream_ = 0, all_ = 0, rate_ = 0, due_ = 0;
};

}  // namespace fused_densenet::FD_ISA
