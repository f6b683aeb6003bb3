// Lists of tensors that Python holds as one tensor, and the way of gradients from what is differentiated by such lists
// to their tensors: with no Python object for any of them.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fused_densenet {

// Whether torch was asked to fill memory that nobody has written.
inline bool fills_empty_memory() {
  const at::Context& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

// Uninitialised, in large pages where there is room for some: what is kept, and read from end to end, misses few of
// them.
inline at::Tensor empty_bytes(int64_t bytes) {
  at::Tensor memory = at::empty({bytes}, at::kByte);
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data_ptr()), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return memory;
}

// Given once, looked at in every call. A tensor of one number holds it, as its data: the beginning of the list's
// memory, which is no number that anomaly detection would look for.
class Bound {
 public:
  static at::Tensor hold(std::vector<at::Tensor> tensors, bool constant = false) {
    auto* const bound = new Bound(std::move(tensors), constant);
    return at::for_blob(bound, {1}).context(bound, destroy).options(at::kDouble).make_tensor();
  }
  static at::Tensor bind(at::TensorList given, bool constant) { return hold(given.vec(), constant); }
  static const Bound& of(const at::Tensor& holder) {
    TORCH_CHECK(holder.has_storage() && holder.storage().data_ptr().get_deleter() == destroy,
                "fused_densenet: expected a list of tensors that was bound, got another tensor; a hook of a network's "
                "node in autograd's graph may pass its gradients on or look at them: to change the gradient of a "
                "parameter, register the hook on the parameter");
    return *static_cast<const Bound*>(holder.const_data_ptr());
  }

  const std::vector<at::Tensor>& tensors() const { return tensors_; }

  // Whether their values stay, too.
  bool constant() const { return constant_; }

  // Where each of `weights`, some of these, is in one of the kernels' layouts. Those that no call asked for yet are
  // packed now, by `pack(i, memory)` of `bytes_of(i)`, side by side.
  using Packed = std::pair<const void*, int>;
  template <class Bytes, class Pack>
  std::vector<void*> packed(const std::vector<Packed>& weights, Bytes bytes_of, Pack pack) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    constexpr size_t line = 64;
    std::vector<void*> result(weights.size());
    std::map<Packed, size_t> missing;
    size_t bytes = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (const auto found = packed_.find(weights[i]); found != packed_.end())
        result[i] = found->second;
      else if (missing.try_emplace(weights[i], bytes).second)
        bytes += (bytes_of(i) + line - 1) / line * line;
    }
    if (missing.empty()) return result;
    kept_.push_back(empty_bytes(static_cast<int64_t>(bytes)));
    for (size_t i = 0; i < weights.size(); ++i) {
      if (result[i] != nullptr) continue;
      result[i] = static_cast<char*>(kept_.back().data_ptr()) + missing[weights[i]];
      if (packed_.contains(weights[i])) continue;
      pack(i, result[i]);
      packed_.emplace(weights[i], result[i]);
    }
    return result;
  }

  // At least so many bytes for one call, which gives them back. What a call of constant tensors worked in is kept for
  // the next one, so that the system need not map it again; of calls at once as much as they were.
  at::Tensor borrow(int64_t bytes) const {
    at::Tensor found;
    if (reuses()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) found = std::move(free_.back()), free_.pop_back();
    }
    if (!found.defined() || found.numel() < bytes) {
      found.reset();
      found = constant_ ? empty_bytes(bytes) : at::empty({bytes}, at::kByte);
    }
    return found;
  }
  void give_back(at::Tensor memory) const {
    if (!reuses()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(memory));
  }

  // Whether they have the sizes that they had.
  bool holds() const {
    auto at = sizes_.begin();
    for (const at::Tensor& t : tensors_) {
      for (const int64_t size : t.sizes()) {
        if (at == sizes_.end() || *at++ != size) return false;
      }
    }
    return at == sizes_.end();
  }

 private:
  bool reuses() const { return constant_ && !fills_empty_memory(); }

  static void destroy(void* bound) { delete static_cast<Bound*>(bound); }

  Bound(std::vector<at::Tensor> tensors, bool constant) : tensors_(std::move(tensors)), constant_(constant) {
    for (const at::Tensor& t : tensors_) sizes_.insert(sizes_.end(), t.sizes().begin(), t.sizes().end());
  }

  std::vector<at::Tensor> tensors_;
  std::vector<int64_t> sizes_;
  bool constant_;
  mutable std::mutex mutex_;
  mutable std::map<Packed, void*> packed_;
  mutable std::vector<at::Tensor> kept_;
  mutable std::vector<at::Tensor> free_;
};

inline std::vector<at::Tensor> bound_tensors(const at::Tensor& holder) { return Bound::of(holder).tensors(); }

// Uninitialised, each laid out like its tensor; filled where torch was asked to fill such memory.
inline std::vector<at::Tensor> empty_like(at::TensorList tensors) {
  const bool fills = fills_empty_memory();
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& t : tensors) {
    result.push_back(t.is_non_overlapping_and_dense() && !fills
                         ? at::Tensor(at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type()))
                         : at::empty_like(t));
  }
  return result;
}

inline at::Tensor bind_like(const at::Tensor& holder) { return Bound::hold(empty_like(Bound::of(holder).tensors())); }

// In a backward pass: of each list a holder of its gradients, in the same order.
class Distribute : public torch::autograd::Node {
 public:
  explicit Distribute(at::TensorList holders) : holders_(holders.vec()) {
    for (const at::Tensor& holder : holders_) {
      for (const at::Tensor& t : Bound::of(holder).tensors()) {
        add_next_edge(torch::autograd::impl::gradient_edge(t));
        versions_.push_back(version(t));
      }
    }
  }

  std::string name() const override { return "fused_densenet::parameters"; }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "fused_densenet: this backward pass is compiled, and its forward pass was not run so: "
                                "enable compiled autograd before the forward pass, too");
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    torch::autograd::variable_list result;
    result.reserve(versions_.size());
    for (size_t i = 0; i < holders_.size(); ++i) {
      const size_t count = Bound::of(holders_[i]).tensors().size();
      if (gradients[i].defined()) {
        const auto& found = Bound::of(gradients[i]).tensors();
        TORCH_INTERNAL_ASSERT(found.size() == count);
        result.insert(result.end(), found.begin(), found.end());
      } else {
        result.resize(result.size() + count);
      }
    }
    return result;
  }

  // Refuses parameters that were changed in place since the forward pass.
  void check() const {
    auto expected = versions_.begin();
    for (const at::Tensor& holder : holders_) {
      for (const at::Tensor& t : Bound::of(holder).tensors()) check(t, *expected++);
    }
  }

 private:
  static uint32_t version(const at::Tensor& t) { return t.unsafeGetTensorImpl()->version_counter().current_version(); }

  static void check(const at::Tensor& t, uint32_t expected) {
    TORCH_CHECK(version(t) == expected,
                "one of the variables needed for gradient computation has been modified by an inplace operation: [",
                t.toString(), " ", t.sizes(), "] is at version ", version(t), "; expected version ", expected,
                " instead.");
  }

  std::vector<at::Tensor> holders_;
  std::vector<uint32_t> versions_;
};

// torch holds its nodes by other pointers from version to version.
template <class Pointer>
Pointer owner_of(torch::autograd::Node* node) {
  if constexpr (std::is_constructible_v<Pointer, torch::autograd::Node*>)
    return Pointer(node);
  else
    return Pointer::unsafe_steal_from_new(node);
}

// For each list a tensor to differentiate by in its place. None where not each tensor of all needs a gradient.
inline std::vector<at::Tensor> stand_ins(at::TensorList holders) {
  for (const at::Tensor& holder : holders) {
    const auto& tensors = Bound::of(holder).tensors();
    if (!std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return t.requires_grad(); })) return {};
  }
  const auto node = owner_of<decltype(torch::autograd::Edge::function)>(new Distribute(holders));
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < holders.size(); ++i) {
    result.push_back(at::zeros({1}, at::kDouble));
    torch::autograd::impl::set_gradient_edge(result.back(), {node, node->add_input_metadata(result.back())});
  }
  return result;
}

inline void check_unchanged(const at::Tensor& stand_in) {
  const auto& node = stand_in.grad_fn();
  const auto* const parameters = dynamic_cast<const Distribute*>(node.get());
  TORCH_CHECK(parameters != nullptr, "stand_in: expected one of stand_ins");
  parameters->check();
}

}  // namespace fused_densenet
