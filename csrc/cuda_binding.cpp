// The primitives' operators for CUDA tensors, against torch's stable ABI: one library for torch 2.11 and later, with or
// without CUDA of its own. The schemas are fused_densenet/backends/extension.py's. Under CUDA_HOST (tests) the same
// operators serve CPU tensors with the kernels that the runner executes.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/launch.h"
#include "operators.h"
#include "program.h"
#include "running.h"

#ifdef CUDA_HOST
#define FD_DEVICE CPU
#ifndef FD_MULTIPROCESSORS
#define FD_MULTIPROCESSORS 4
#endif
#else
#include <cuda_runtime_api.h>
#define FD_LIBRARY fused_densenet
#define FD_DEVICE CUDA

// Declared only for builds of torch with CUDA, and defined only by them.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fused_densenet {
namespace {

#ifdef CUDA_HOST
struct Queue {
  explicit Queue(int) {}
  Device device{FD_MULTIPROCESSORS, 227 << 10, 90};
  void* stream = nullptr;
};

std::string describe(int error) { return "CUDA error " + std::to_string(error); }
#else
std::string describe(int error) {
  const auto code = static_cast<cudaError_t>(error);
  return "CUDA error " + std::to_string(error) + " (" + cudaGetErrorName(code) + "): " + cudaGetErrorString(code);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) throw std::runtime_error("fused_densenet: " + describe(error));
  return value;
}

// Asked once for each device.
const Device& device_of(int index) {
  constexpr int most = 64;
  static std::array<Device, most> devices;
  static std::array<std::once_flag, most> asked;
  if (index < 0 || index >= most) throw std::runtime_error("fused_densenet: no device " + std::to_string(index));
  std::call_once(asked[index], [index] {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
    devices[index] = {attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                      10 * major + attribute(cudaDevAttrComputeCapabilityMinor, index)};
  });
  return devices[index];
}

void* current_stream(int device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("fused_densenet: this torch was built without CUDA");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// The device of the data, current for as long as this lives, and torch's current stream on it.
struct Queue {
  explicit Queue(int index) : guard(index), device(device_of(index)), stream(current_stream(index)) {}
  torch::stable::accelerator::DeviceGuard guard;
  const Device& device;
  void* stream;
};
#endif

Arithmetic arithmetic_of(const Argument& data, bool tf32) {
  switch (dtype_of(data)) {
    case DType::bf16:
      return Arithmetic::bf16;
    case DType::f16:
      return Arithmetic::f16;
    case DType::f32:
      return tf32 ? Arithmetic::tf32 : Arithmetic::f32;
    default:
      refuse<WrongType>(data, "expected float32, bfloat16 or float16, got ", data.dtype);
  }
}

// torch's own conversion asks for the code of one type after the other.
ScalarType scalar_type(int32_t code) {
  static const std::array<int32_t, 3> codes{aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                            aoti_torch_dtype_float16()};
  if (code == codes[0]) return ScalarType::Float;
  if (code == codes[1]) return ScalarType::BFloat16;
  if (code == codes[2]) return ScalarType::Half;
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code));
}

struct Release {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};

// The operators' binding to the tensors of torch's stable ABI, held by unique pointers: torch::stable::Tensor counts
// references, which for the 16 tensors of a call costs microseconds.
struct Cuda {
  using Tensor = std::unique_ptr<AtenTensorOpaque, Release>;

  static Argument argument(const Tensor& t, const char* name) {
    const AtenTensorHandle handle = t.get();
    int32_t dtype = 0, device = 0, index = 0;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    return {name, scalar_type(dtype), static_cast<DeviceType>(device), index, dim, sizes, strides, data, true};
  }

  static std::vector<Argument> arguments(const std::vector<Tensor>& tensors, const char* name) {
    std::vector<Argument> result;
    result.reserve(tensors.size());
    for (const Tensor& t : tensors) result.push_back(argument(t, name));
    return result;
  }

  static void check(const Argument& data) {
    if (data.device != DeviceType::FD_DEVICE) {
      refuse<WrongValue>(data, "expected a tensor of ", C10_STRINGIZE(FD_DEVICE), ", got one on ", On{data});
    }
    arithmetic_of(data, false);
  }

  template <class P>
  static void run(const P& problem, const Argument& data, bool tf32) {
    run_all(data, tf32, [&](auto visit) { visit(problem); });
  }

  static void run_program(const Tensor& program, const std::vector<Tensor>& tensors, bool tf32,
                          const std::vector<Tensor>& bound) {
    if (!bound.empty()) throw WrongValue("bound: expected none, got tensors");
    const std::vector<Argument> operands = arguments(tensors, "operand");
    if (operands.empty()) throw WrongValue("operands: expected at least one tensor");
    const Argument &data = operands[0], code = argument(program, "program");
    check(data);
    if (code.dtype != ScalarType::Long || code.device != DeviceType::CPU || code.dim != 1 || code.strides[0] != 1) {
      throw WrongValue("program: expected a contiguous tensor of int64");
    }
    const auto problems = Decoder(static_cast<const int64_t*>(code.data), code.sizes[0], operands).problems();
    run_all(data, tf32, [&](auto visit) {
      for (const Problem& problem : problems) std::visit(visit, problem);
    });
  }

  static void update_running(const std::vector<Tensor>& stats, const std::vector<Tensor>& inside,
                             const std::vector<int64_t>& groups, const std::vector<Tensor>& buffers,
                             const std::vector<double>& momenta, const std::vector<double>& unbiased,
                             const std::optional<Tensor>& bound) {
    if (bound) throw WrongValue("bound: expected None, got a tensor");
    const auto batches = arguments(stats, "stats");
    if (batches.empty()) return;
    check(batches[0]);
    for (const Argument& one : batches) {
      if (one.dtype != ScalarType::Float) refuse<WrongType>(one, "expected float32, got ", one.dtype);
    }
    const auto updates =
        running_updates(batches, arguments(inside, "inside"), groups, arguments(buffers, "buffers"), momenta, unbiased);
    const Queue queue(batches[0].device_index);
    const RunningUpdates all{updates.data(), static_cast<int64_t>(updates.size())};
    succeed(fused_densenet::update_running(all, Arithmetic::f32, queue.device, nullptr, queue.stream));
  }

 private:
  static void succeed(int error) {
    if (error != 0) throw std::runtime_error("fused_densenet: " + describe(error));
  }

  // The problems that each(visit) visits, in order: one workspace, one device, one stream for all, and what they need
  // prepared at once.
  template <class Each>
  static void run_all(const Argument& data, bool tf32, Each each) {
    const Queue queue(data.device_index);
    const Device& device = queue.device;
    const Arithmetic arithmetic = arithmetic_of(data, tf32 && device.capability >= 80);
    std::vector<Needs> needs;
    size_t prepared = 0, scratch = 0;
    each([&](const auto& problem) {
      const bool nothing = problem.shape.pixels() == 0;
      needs.push_back(nothing ? Needs{} : launcher(problem).needs(problem, arithmetic, device));
      prepared += needs.back().prepared;
      scratch = std::max(scratch, needs.back().workspace);
    });
    const Workspace workspace(data, prepared + scratch);
    unsigned char* const memory = static_cast<unsigned char*>(workspace.address());
    if (prepared > 0) {
      std::vector<Preparation> preparations;
      unsigned char* at = memory;
      for (const Needs& own : needs) {
        if (own.prepared > 0) preparations.push_back(own.preparation), preparations.back().at = at;
        at += own.prepared;
      }
      succeed(prepare(preparations.data(), static_cast<int64_t>(preparations.size()), arithmetic, queue.stream));
    }
    const Needs* own = needs.data();
    unsigned char* at = memory;
    each([&](const auto& problem) {
      if (problem.shape.pixels() != 0) {
        succeed(launcher(problem).run(problem, arithmetic, device, at, memory + prepared, queue.stream));
      }
      at += (own++)->prepared;
    });
  }

  // From torch's allocator, so that it is ordered by the stream and belongs to a graph that is being captured. Aligned
  // to 256 bytes.
  class Workspace {
   public:
    Workspace(const Argument& data, size_t bytes) {
      if (bytes == 0) return;
      const int64_t size = static_cast<int64_t>(bytes) + 256, stride = 1;
      AtenTensorHandle handle = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                      static_cast<int32_t>(data.device), data.device_index, &handle));
      memory_.reset(handle);
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &address_));
      address_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(address_) + 255) / 256 * 256);
    }
    void* address() const { return address_; }

   private:
    Tensor memory_;
    void* address_ = nullptr;
  };
};

template <class T>
T unboxed(StableIValue value);

template <class T>
std::vector<T> unboxed_list(StableIValue value) {
  struct Delete {
    void operator()(StableListOpaque* list) const { torch_delete_list(list); }
  };
  const std::unique_ptr<StableListOpaque, Delete> list(torch::stable::detail::to<StableListHandle>(value));
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list.get(), &size));
  std::vector<T> elements;
  elements.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.get(), i, &element));
    elements.push_back(unboxed<T>(element));
  }
  return elements;
}

template <class T>
T unboxed(StableIValue value) {
  if constexpr (std::is_same_v<T, Cuda::Tensor>) {
    return Cuda::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  } else if constexpr (std::is_same_v<T, std::vector<Cuda::Tensor>> || std::is_same_v<T, std::vector<double>> ||
                       std::is_same_v<T, std::vector<int64_t>>) {
    return unboxed_list<typename T::value_type>(value);
  } else if constexpr (std::is_same_v<T, std::optional<Cuda::Tensor>>) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? T(Cuda::Tensor(*handle)) : T();
  } else {
    return torch::stable::detail::to<T>(value);
  }
}

// An operator as torch calls it: it owns what is on the stack, and returns nothing.
template <auto function>
struct Boxed;

template <class... Arguments, void (*function)(Arguments...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t, uint64_t) { apply(stack, std::index_sequence_for<Arguments...>{}); }

  template <size_t... i>
  static void apply(StableIValue* stack, std::index_sequence<i...>) {
    const std::tuple<std::remove_cvref_t<Arguments>...> arguments{unboxed<std::remove_cvref_t<Arguments>>(stack[i])...};
    std::apply(function, arguments);
  }
};

#ifndef CUDA_HOST
#define FD_QUOTED(...) #__VA_ARGS__
#define FD_AS_STRING(...) FD_QUOTED(__VA_ARGS__)
#define FD_EXPORTED extern "C" __attribute__((visibility("default")))

// The GPUs compiled for, as setup.py got them: 8.0:9.0+PTX.
FD_EXPORTED const char* fused_densenet_cuda_architectures() { return FD_AS_STRING(FD_ARCHITECTURES); }

// Why the CUDA runtime in this library cannot use a device, or null.
FD_EXPORTED const char* fused_densenet_cuda_problem(int device) {
  static thread_local std::string message;
  int count = 0, error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && device >= count) error = cudaErrorInvalidDevice;
  message = error == cudaSuccess ? "" : describe(error);
  return error == cudaSuccess ? nullptr : message.c_str();
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FD_LIBRARY, FD_DEVICE, m) {
  using Operators = Operators<Cuda>;
  m.impl("place", Boxed<&Operators::place>::call);
  m.impl("place_backward", Boxed<&Operators::place_backward>::call);
  m.impl("norm_relu_conv", Boxed<&Operators::norm_relu_conv>::call);
  m.impl("norm_relu_conv_backward", Boxed<&Operators::norm_relu_conv_backward>::call);
  m.impl("norm_relu_pool", Boxed<&Operators::norm_relu_pool>::call);
  m.impl("norm_relu_pool_backward", Boxed<&Operators::norm_relu_pool_backward>::call);
  m.impl("run_program", Boxed<&Cuda::run_program>::call);
  m.impl("update_running", Boxed<&Cuda::update_running>::call);
}

}  // namespace fused_densenet
