// The workspace of a call.

namespace fused_densenet::FD_ISA {

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

}  // namespace fused_densenet::FD_ISA
