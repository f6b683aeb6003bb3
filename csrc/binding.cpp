// The primitives' operators for CPU tensors: a library for one version of torch and every Python. The schemas are
// fused_densenet/backends/extension.py's.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
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
#include "pages.h"
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

  // Behind `tensors` come those that are bound.
  static void run_program(const Tensor& program, at::TensorList tensors, bool, at::TensorList bound) {
    std::vector<Argument> operands;
    for (const Tensor& t : tensors) operands.push_back(argument(t, "operand"));
    execute(program, operands, bound);
  }

  // The images stand in two places in memory: `layout` has the entries of both, which of them is lent to the calls,
  // from which entry and which call on, the sizes and strides of the result, and of every other image its place, its
  // sizes and its strides. The first place is the memory of an x that is `spent`, where there is enough of it. A result
  // of one pixel may be `flat`: (N, C).
  static Tensor run_network(const Tensor& program, const Tensor& x, at::IntArrayRef layout, bool spent, bool flat,
                            const Tensor& bound) {
    const Argument input = argument(x, "x");
    const size_t dim = static_cast<size_t>(x.dim()), head = 5 + 2 * dim, view = 1 + 2 * dim;
    if (layout.size() < head || (layout.size() - head) % view != 0 || layout[2] < 0 || layout[2] > 1) {
      throw WrongValue("layout: expected five numbers, and sizes and strides of images");
    }
    const int64_t size = x.element_size(), of_x = x.storage().nbytes() - x.storage_offset() * size;
    const bool inside = spent && of_x >= layout[0] * size;
    const int64_t first = layout[0] * size, second = layout[1] * size;
    const int64_t second_begin = inside ? 0 : (first + kAlignment - 1) / kAlignment * kAlignment + kApart;
    const Borrowed memory(Bound::of(bound), second_begin + second);
    const Memory places[2] = {inside ? Memory{input.data, static_cast<size_t>(of_x)} : memory.part(0, first),
                              memory.part(second_begin, second)};
    const at::IntArrayRef sizes = layout.slice(5, dim), strides = layout.slice(5 + dim, dim);
    flat = flat && std::all_of(sizes.begin() + 2, sizes.end(), [](int64_t size) { return size == 1; });
    const size_t dims = flat ? 2 : dim;
    const Tensor result = at::empty_strided(sizes.slice(0, dims), strides.slice(0, dims), x.options());
    std::vector<Argument> operands{input};
    for (size_t at = head; at != layout.size(); at += view) {
      const int64_t place = layout[at], *const own_sizes = &layout[at + 1], *const own_strides = own_sizes + dim;
      int64_t last = 0;
      for (size_t i = 0; i < dim; ++i) last += (own_sizes[i] - 1) * own_strides[i];
      if (place < 0 || place > 1 || last >= layout[place])
        throw WrongValue("layout: expected images inside of a place");
      operands.push_back(input);
      operands.back().name = "image", operands.back().data = places[place].data;
      operands.back().sizes = own_sizes, operands.back().strides = own_strides;
    }
    operands.push_back(argument(result, "result"));
    operands.back().dim = input.dim, operands.back().sizes = sizes.data(), operands.back().strides = strides.data();
    // While the first call writes the image whose place is lent later, nothing else is in the other place but x.
    const Memory& lender = places[layout[2]];
    const size_t used = std::min(static_cast<size_t>(layout[3] * size), lender.bytes);
    execute(program, operands, bound,
            {layout[2] == 1 && !inside ? places[0] : Memory{},
             {static_cast<char*>(lender.data) + used, lender.bytes - used},
             layout[4]});
    return result;
  }

 private:
  static constexpr int64_t kAlignment = 64;  // lines of the cache
  // Between the places: where both began equally far into a page, processors would take what is read in one for what
  // was just written to the other.
  static constexpr int64_t kApart = 33 * kAlignment;

  class Borrowed {
   public:
    Borrowed(const Bound& lender, int64_t bytes) : lender_(lender), memory_(lender.borrow(bytes)) {}
    ~Borrowed() { lender_.give_back(std::move(memory_)); }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;
    Memory part(int64_t begin, int64_t bytes) const {
      return {static_cast<char*>(memory_.data_ptr()) + begin, static_cast<size_t>(bytes)};
    }

   private:
    const Bound& lender_;
    Tensor memory_;
  };

  // What the first call may work in, and all from the call `from` on.
  struct Spare {
    Memory at_first, later;
    int64_t from;
  };

  // The calls work in what is `spare`, else in one workspace for all: a small one, or where that does not do one of the
  // size that they need. Behind `operands` come those that are bound.
  static void execute(const Tensor& program, std::vector<Argument>& operands, at::TensorList bound,
                      const Spare& spare = {}) {
    size_t count = operands.size();
    for (const Tensor& holder : bound) count += Bound::of(holder).tensors().size();
    operands.reserve(count);
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
      if (one.constant()) prepare(problems, one, kernels);
    }
    const auto bytes_of = [&](const Problem& problem) {
      return std::visit([&](const auto& p) { return Call(p, kernels).bytes(); }, problem);
    };
    const auto most_bytes = [&](auto begin, auto end) {
      size_t bytes = 0;
      for (; begin != end; ++begin) bytes = std::max(bytes, bytes_of(*begin));
      return bytes;
    };
    const auto lends = problems.begin() + std::clamp<int64_t>(spare.from, 0, std::ssize(problems));
    const Memory first = Workspace(spare.at_first).memory(), later = Workspace(spare.later).memory();
    const auto own = problems.begin() + (first.bytes > 0 && lends != problems.begin());
    constexpr size_t small = 64 << 10;
    Workspace workspace(later.bytes > 0 ? most_bytes(own, lends) : small);
    for (auto problem = problems.begin(); problem != problems.end(); ++problem) {
      const auto fits = [&](const Memory& memory) {
        return std::visit([&](const auto& p) { return Call(p, kernels).run(memory) <= memory.bytes; }, *problem);
      };
      if (problem < own ? fits(first) : problem >= lends && later.bytes > 0 && fits(later)) continue;
      if (fits(workspace.memory())) continue;
      workspace = Workspace(most_bytes(problem, problems.end()));
      fits(workspace.memory());
    }
  }

  // Lets convolutions read weights, which are some of `bound`, as they are packed once.
  static void prepare(std::vector<Problem>& problems, const Bound& bound, const Kernels& kernels) {
    const Packing& packing = kernels.packing;
    std::vector<Forward*> convolutions;
    std::vector<Bound::Packed> weights;
    for (Problem& problem : problems) {
      Forward* one = std::get_if<Forward>(&problem);
      if (auto* const strided = std::get_if<StridedConv>(&problem)) one = strided;
      if (one == nullptr || one->shape.pixels() == 0) continue;
      convolutions.push_back(one);
      weights.emplace_back(one->weight.data, packing.layout(*one));
    }
    const std::vector<void*> packed = bound.packed(
        weights, [&](size_t i) { return packing.bytes(*convolutions[i]); },
        [&](size_t i, void* memory) {
          packing.pack(*convolutions[i], memory, parallel(static_cast<int64_t>(packing.bytes(*convolutions[i]))));
        });
    for (size_t i = 0; i < packed.size(); ++i) {
      convolutions[i]->weight.data = packed[i], convolutions[i]->weight.packed = true;
    }
  }

  // Memory that begins where a line of the cache does: its own, or inside of what is given.
  class Workspace {
   public:
    explicit Workspace(size_t bytes)
        : owner_(at::empty({static_cast<int64_t>(bytes) + kAlignment}, at::kByte)),
          memory_{aligned(owner_.data_ptr()), bytes} {}
    explicit Workspace(const Memory& memory)
        : memory_{aligned(memory.data), std::max<size_t>(memory.bytes, kAlignment) - kAlignment} {}
    const Memory& memory() const { return memory_; }

   private:
    static void* aligned(void* data) {
      constexpr uintptr_t line = kAlignment;
      return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data) + line - 1) / line * line);
    }
    Tensor owner_;
    Memory memory_;
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
  m.impl("strided_conv", Translated<&Operators::strided_conv<at::IntArrayRef>>::call);
  m.impl("norm_relu_pool_backward", Translated<&Operators::norm_relu_pool_backward>::call);
  m.impl("run_program", Translated<&Cpu::run_program>::call);
  m.impl("run_network", Translated<&Cpu::run_network>::call);
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

TORCH_LIBRARY_IMPL(fused_densenet, CompositeExplicitAutograd, m) { m.impl("empty_pages", empty_pages); }

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

FD_EXPORTED void fused_densenet_release_pages() { Pages::instance().release(); }

FD_EXPORTED const char* fused_densenet_cpu_compiler() { return __VERSION__; }

}  // namespace fused_densenet
