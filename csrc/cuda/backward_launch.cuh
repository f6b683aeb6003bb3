// Which kernels a backward runs: the whole in one launch where the weight gradient's rows fit a block's registers, else
// the data gradient in one and the weight gradient in another. Then the partial sums are added.
#pragma once

#include "backward.cuh"
#include "partials.cuh"

namespace fused_densenet {

// For what the larger tiles have no room for, or too few blocks.
template <Arithmetic A>
using SmallBackward = BackwardConfig<A, 32, 64, 2, 4, 14, true, false>;

template <class C>
int launch_backward(const Backward& f, const BackwardPlan& plan, float* weights, float* sums, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(f.shape.in, C::channels)), static_cast<unsigned>(plan.splits),
                  plan.data ? 1 : static_cast<unsigned>(plan.passes()));
  return launch_kernel(backward_kernel<C>, grid, dim3(C::threads), static_cast<size_t>(plan.shared), stream, f, plan,
                       weights, sums);
}

extern template int launch_backward<SmallBackward<Arithmetic::bf16>>(const Backward&, const BackwardPlan&, float*,
                                                                     float*, void*);
extern template int launch_backward<SmallBackward<Arithmetic::f16>>(const Backward&, const BackwardPlan&, float*,
                                                                    float*, void*);
extern template int launch_backward<SmallBackward<Arithmetic::tf32>>(const Backward&, const BackwardPlan&, float*,
                                                                     float*, void*);
extern template int launch_backward<SmallBackward<Arithmetic::f32>>(const Backward&, const BackwardPlan&, float*,
                                                                    float*, void*);

template <class Large, class Small>
class BackwardLaunches {
 public:
  BackwardLaunches(const Backward& f, const Device& device) : f_(f), device_(device), biases_(bias_splits(f, device)) {
    const bool weight = f.dweight.data != nullptr;
    possible_ = f.shape.pixels() <= INT32_MAX;
    for (const Pixels& p : {f.grad.stored, f.grad.value, f.x, f.dx})
      possible_ = possible_ && p.ld * Small::tile.element <= INT32_MAX;
    if (f.shape.pixels() == 0 || !possible_) return;
    if (weight && add(true, true)) return;
    possible_ = add(true, false) && (!weight || add(false, true));
  }

  size_t workspace() const {
    return weight_bytes() + sum_bytes() + static_cast<size_t>(round_up(biases_ * f_.shape.out * 4, 256));
  }

  int run(void* workspace, void* stream) const {
    if (!possible_) return cudaErrorInvalidConfiguration;
    const auto at = [&](size_t bytes) {
      return reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + bytes);
    };
    Partials weights{at(0), 0, f_.dweight.data == nullptr ? 0 : weight_values()};
    Partials sums{at(weight_bytes()), 0, f_.owed.dweight == nullptr ? 0 : sum_values()};
    const Partials biases{at(weight_bytes() + sum_bytes()), biases_, biases_ == 0 ? 0 : f_.shape.out};
    for (int i = 0; i < count_; ++i) {
      const int error =
          (large_[i] ? launch_backward<Large> : launch_backward<Small>)(f_, plans_[i], weights.data, sums.data, stream);
      if (error != cudaSuccess) return error;
      if (plans_[i].weight) weights.splits = plans_[i].splits;
      if (plans_[i].data) sums.splits = plans_[i].splits;
    }
    const int error = biases_ == 0 ? cudaSuccess : sum_gradient(f_, Large::A, biases, stream);
    return error != cudaSuccess ? error : add_partials(f_, Large::A, weights, sums, biases, stream);
  }

 private:
  bool add(bool data, bool weight) {
    BackwardPlan& plan = plans_[count_];
    bool large = f_.shape.in > Small::channels || Large::channels <= Small::channels;
    large = large && make_plan(plan, f_, data, weight, Large::tile, device_) &&
            2 * plan.count * ceil_div(f_.shape.in, Large::channels) >= device_.multiprocessors;
    if (!large && !make_plan(plan, f_, data, weight, Small::tile, device_)) return false;
    const auto access = [](const Pixels& p) { return access_of(p.data, p.ld * Small::tile.element); };
    plan.gradient_access = std::min(access(f_.grad.stored), access(f_.grad.value));
    plan.x_access = std::min(access(f_.x), access(f_.dx));
    large_[count_++] = large;
    return true;
  }
  int64_t weight_values() const { return f_.shape.taps() * f_.shape.out * f_.shape.in; }
  int64_t sum_values() const { return 2 * f_.shape.in; }
  size_t weight_bytes() const { return bytes(&BackwardPlan::weight, weight_values()); }
  size_t sum_bytes() const { return bytes(&BackwardPlan::data, sum_values()); }
  size_t bytes(bool BackwardPlan::* wanted, int64_t values) const {
    size_t total = 0;
    for (int i = 0; i < count_; ++i) {
      if (plans_[i].*wanted) total = static_cast<size_t>(round_up(plans_[i].splits * values * 4, 256));
    }
    return total;
  }

  const Backward& f_;
  const Device& device_;
  const int biases_;  // slices of the bias's gradient
  BackwardPlan plans_[2];
  bool large_[2];
  int count_ = 0;
  bool possible_ = true;
};

// visit(BackwardLaunches) with the tiles for `arithmetic`; Large: a template of one arithmetic of 16 bits.
template <template <Arithmetic> class Large, class Visit>
auto with_backward_launches(const Backward& f, Arithmetic arithmetic, const Device& device, Visit visit) {
  constexpr Arithmetic bf16 = Arithmetic::bf16, f16 = Arithmetic::f16, tf32 = Arithmetic::tf32, f32 = Arithmetic::f32;
  switch (arithmetic) {
    case bf16:
      return visit(BackwardLaunches<Large<bf16>, SmallBackward<bf16>>(f, device));
    case f16:
      return visit(BackwardLaunches<Large<f16>, SmallBackward<f16>>(f, device));
    case tf32:
      return visit(BackwardLaunches<SmallBackward<tf32>, SmallBackward<tf32>>(f, device));
    default:
      return visit(BackwardLaunches<SmallBackward<f32>, SmallBackward<f32>>(f, device));
  }
}

}  // namespace fused_densenet
