// The primitives' operators for CPU tensors: a library for one version of torch and every Python. The schemas are
// fused_densenet/backends/extension.py's.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "bound.h"
#include "cpu/params.h"
#include "operators.h"
#include "program.h"
#include "running.h"

namespace fused_densenet {
namespace {

using at::Tensor;

void run_serially(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

// By torch's own OpenMP: this library has none.
void run_in_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  struct Work {
    void (*body)(void*, int64_t);
    void* context;
  } work{body, context};
  const auto run = [](int64_t begin, int64_t end, void* of) {
    const Work& work = *static_cast<Work*>(of);
    for (int64_t i = begin; i < end; ++i) work.body(work.context, i);
  };
  TORCH_CHECK(torch_parallel_for(0, count, 1, run, &work) == 0, "fused_densenet: a kernel failed");
}

// `work` is in multiply-adds: a thread that gets too little of it costs more than it saves.
Parallel parallel(int64_t work) {
  constexpr int64_t least_per_thread = 1 << 16;
  const int threads = static_cast<int>(std::min<int64_t>(work / least_per_thread + 1, at::get_num_threads()));
  return {threads == 1 ? run_serially : run_in_parallel, threads};
}

std::string capability() { return at::get_cpu_capability(); }

// The operators' binding to at::Tensor.
struct Cpu {
  using Tensor = at::Tensor;

  static Argument argument(const Tensor& t, const char* name) {
    const Argument result{name,    t.scalar_type(),  t.device().type(),  t.device().index(),
                          t.dim(), t.sizes().data(), t.strides().data(), t.data_ptr(),
                          true};
    if (result.data == nullptr && t.numel() != 0)
      refuse<WrongValue>(result, "expected data, got a storage without any");
    return result;
  }

  static void check(const Argument& data) {
    if (data.device != DeviceType::CPU) refuse<WrongValue>(data, "expected a CPU tensor, got one on ", On{data});
  }

  template <class P>
  static void run(const P& problem, const Argument& data, bool) {
    const Call<P> call(problem, kernels_for(dtype_of(data), capability().c_str()));
    call.run(Workspace(call.bytes()).memory());
  }

  // One workspace for all calls: a small one, where that does not do `spare` memory, which the first call may still
  // read, or memory of its own. Behind `tensors` come those that are bound.
  static void run_program(const Tensor& program, at::TensorList tensors, bool, at::TensorList bound,
                          const std::optional<Tensor>& spare) {
    size_t count = tensors.size();
    for (const Tensor& holder : bound) count += Bound::of(holder).tensors().size();
    std::vector<Argument> operands;
    operands.reserve(count);
    for (const Tensor& t : tensors) operands.push_back(argument(t, "operand"));
    for (const Tensor& holder : bound) {
      for (const Tensor& t : Bound::of(holder).tensors()) operands.push_back(argument(t, "operand"));
    }
    if (operands.empty()) throw WrongValue("operands: expected at least one tensor");
    check(operands[0]);
    if (program.scalar_type() != at::kLong || !program.is_contiguous()) {
      throw WrongValue("program: expected a contiguous tensor of int64");
    }
    auto problems = Decoder(program.const_data_ptr<int64_t>(), program.numel(), operands).problems();
    const Kernels& kernels = kernels_for(dtype_of(operands[0]), capability().c_str());
    for (const Tensor& holder : bound) {
      const Bound& one = Bound::of(holder);
      if (!one.constant()) continue;
      for (Problem& problem : problems) {
        if (auto* forward = std::get_if<Forward>(&problem)) prepare(*forward, one, kernels);
      }
    }
    const auto bytes_of = [&](const Problem& problem) {
      return std::visit([&](const auto& p) { return Call(p, kernels).bytes(); }, problem);
    };
    constexpr size_t small = 64 << 10;
    Workspace workspace(spare && !problems.empty() ? bytes_of(problems[0]) : small);
    const auto run = [&](const Problem& problem) {
      return std::visit([&](const auto& p) { return Call(p, kernels).run(workspace.memory()); }, problem);
    };
    for (auto problem = problems.begin(); problem != problems.end(); ++problem) {
      if (run(*problem) <= workspace.memory().bytes) continue;
      size_t bytes = 0;
      for (auto next = problem; next != problems.end(); ++next) bytes = std::max(bytes, bytes_of(*next));
      const bool lent = spare && problem != problems.begin() && Workspace(*spare).memory().bytes >= bytes;
      workspace = lent ? Workspace(*spare) : Workspace(bytes);
      run(*problem);
    }
  }

 private:
  // Lets a convolution read its weight, one of `bound`, as it was packed by the first that reads it in the same layout.
  static void prepare(Forward& problem, const Bound& bound, const Kernels& kernels) {
    if (problem.shape.pixels() == 0) return;
    const Packing& packing = kernels.packing;
    problem.weight.data = bound.packed(problem.weight.data, packing.layout(problem), [&] {
      Tensor memory = at::empty({static_cast<int64_t>(packing.bytes(problem))}, at::kByte);
      packing.pack(problem, memory.data_ptr(), parallel(memory.numel()));
      return memory;
    });
    problem.weight.packed = true;
  }

  class Workspace {
   public:
    explicit Workspace(size_t bytes)
        : bytes_(bytes), memory_(at::empty({static_cast<int64_t>(bytes) + kAlignment}, at::kByte)) {}
    explicit Workspace(const Tensor& memory)
        : bytes_(std::max<size_t>(memory.nbytes(), kAlignment) - kAlignment), memory_(memory) {}
    Memory memory() const {
      constexpr uintptr_t alignment = kAlignment;
      return {reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data_ptr()) + alignment - 1) / alignment *
                                      alignment),
              bytes_};
    }

   private:
    static constexpr int kAlignment = 64;
    size_t bytes_;
    Tensor memory_;
  };

  template <class P>
  class Call {
   public:
    Call(const P& problem, const Kernels& kernels)
        : problem_(problem), entry_(entry(kernels, problem)), threads_(parallel(problem.shape.work())) {}
    bool nothing() const { return problem_.shape.pixels() == 0; }
    size_t bytes() const { return nothing() ? 0 : entry_.workspace(problem_, threads_.threads); }
    size_t run(const Memory& workspace) const { return nothing() ? 0 : entry_.run(problem_, workspace, threads_); }

   private:
    const P& problem_;
    const Entry<P>& entry_;
    Parallel threads_;
  };
};

template <class A>
void update_running_of(const std::vector<RunningUpdate>& updates) {
  for (const RunningUpdate& u : updates) ++*u.count;
  for (const RunningUpdate& u : updates) {
    const A momentum = static_cast<A>(u.momentum);
    const auto update = [&](void* running, int64_t stride, const void* batch, A factor) {
      for (int64_t c = 0; c < u.channels; ++c) {
        A& entry = static_cast<A*>(running)[c * stride];
        const A now = static_cast<const A*>(batch)[c] * factor, change = now - entry;
        entry = momentum < A(0.5) ? std::fma(momentum, change, entry) : std::fma(momentum - A(1), change, now);
      }
    };
    update(u.mean, u.mean_stride, u.batch_mean, A(1));
    update(u.var, u.var_stride, u.batch_var, static_cast<A>(u.unbiased));
  }
}

void update_running(at::TensorList stats, at::TensorList inside, at::IntArrayRef groups, at::TensorList buffers,
                    at::ArrayRef<double> momenta, at::ArrayRef<double> unbiased, const std::optional<Tensor>& bound) {
  const auto arguments = [](at::TensorList tensors, const char* name) {
    std::vector<Argument> result;
    for (const Tensor& t : tensors) result.push_back(Cpu::argument(t, name));
    return result;
  };
  const auto batches = arguments(stats, "stats");
  const auto updates =
      running_updates(batches, arguments(inside, "inside"), groups.vec(),
                      arguments(bound ? at::TensorList(Bound::of(*bound).tensors()) : buffers, "buffers"),
                      momenta.vec(), unbiased.vec());
  if (batches.empty()) return;
  Cpu::check(batches[0]);
  if (batches[0].dtype == ScalarType::Double) {
    update_running_of<double>(updates);
  } else {
    update_running_of<float>(updates);
  }
}

// An operator whose refusals are TypeError and ValueError in Python.
template <auto function>
struct Translated;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Translated<function> {
  static Result call(Arguments... arguments) {
    try {
      return function(arguments...);
    } catch (const WrongType& error) {
      TORCH_CHECK_TYPE(false, error.what());
    } catch (const WrongValue& error) {
      TORCH_CHECK_VALUE(false, error.what());
    }
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_densenet, CPU, m) {
  using Operators = Operators<Cpu>;
  m.impl("place", Translated<&Operators::place>::call);
  m.impl("place_backward", Translated<&Operators::place_backward>::call);
  m.impl("norm_relu_conv", Translated<&Operators::norm_relu_conv>::call);
  m.impl("norm_relu_conv_backward", Translated<&Operators::norm_relu_conv_backward>::call);
  m.impl("norm_relu_pool", Translated<&Operators::norm_relu_pool>::call);
  m.impl("norm_relu_mean", Translated<&Operators::norm_relu_mean>::call);
  m.impl("norm_relu_pool_backward", Translated<&Operators::norm_relu_pool_backward>::call);
  m.impl("run_program", Translated<&Cpu::run_program>::call);
  m.impl("update_running", Translated<&update_running>::call);
  m.impl("empty_like", empty_like);
  m.impl("bind", Bound::bind);
  m.impl("bind_like", bind_like);
  m.impl("bound_tensors", bound_tensors);
}

TORCH_LIBRARY_IMPL(fused_densenet, AutogradCPU, m) {
  m.impl("stand_ins", stand_ins);
  m.impl("check_unchanged", check_unchanged);
}

// Of gradients that are batched.
TORCH_LIBRARY_IMPL(fused_densenet, FuncTorchBatched, m) { m.impl("bind", Bound::bind); }
TORCH_LIBRARY_IMPL(fused_densenet, Batched, m) { m.impl("bind", Bound::bind); }

#define FD_EXPORTED extern "C" __attribute__((visibility("default")))

// The instruction set of the kernels for float32 or, `narrow`, bfloat16, by the name of its file in csrc/cpu.
FD_EXPORTED const char* fused_densenet_cpu_instruction_set(bool narrow) {
  return kernels_name(narrow ? DType::bf16 : DType::f32, capability().c_str());
}

// Of the tensors that the data of a holder are.
FD_EXPORTED bool fused_densenet_bound_holds(const void* bound) { return static_cast<const Bound*>(bound)->holds(); }

FD_EXPORTED const char* fused_densenet_cpu_compiler() { return __VERSION__; }

}  // namespace fused_densenet
