// The primitives' operators for CUDA tensors, against torch's stable ABI: one library for torch 2.11 and later, with or
// without CUDA of its own. The schemas are fused_densenet/backends/extension.py's. Under CUDA_HOST (tests) the same
// operators serve CPU tensors with the kernels that the runner executes.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/launch.h"
#include "operators.h"

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

  static void check(const Argument& data) {
    if (data.device != DeviceType::FD_DEVICE) {
      refuse<WrongValue>(data, "expected a tensor of ", C10_STRINGIZE(FD_DEVICE), ", got one on ", On{data});
    }
    arithmetic_of(data, false);
  }

  static void run(const Place& problem, const Argument& data, bool tf32) {
    run(problem, data, tf32, place_workspace, place);
  }
  static void run(const PlaceBackward& problem, const Argument& data, bool tf32) {
    run(problem, data, tf32, place_backward_workspace, place_backward);
  }
  static void run(const Forward& problem, const Argument& data, bool tf32) {
    run(problem, data, tf32, forward_workspace, forward);
  }
  static void run(const Backward& problem, const Argument& data, bool tf32) {
    run(problem, data, tf32, backward_workspace, backward);
  }
  static void run(const NormReluPool& problem, const Argument& data, bool tf32) {
    run(problem, data, tf32, norm_relu_pool_workspace, norm_relu_pool);
  }
  static void run(const NormReluPoolBackward& problem, const Argument& data, bool tf32) {
    run(problem, data, tf32, norm_relu_pool_backward_workspace, norm_relu_pool_backward);
  }

 private:
  template <class Problem>
  static void run(const Problem& problem, const Argument& data, bool tf32,
                  size_t (*workspace)(const Problem&, Arithmetic, const Device&),
                  int (*launch)(const Problem&, Arithmetic, const Device&, void*, void*)) {
    if (problem.shape.pixels() == 0) return;
    const Queue queue(data.device_index);
    const Arithmetic arithmetic = arithmetic_of(data, tf32 && queue.device.capability >= 80);
    const size_t bytes = workspace(problem, arithmetic, queue.device);
    Tensor memory;
    void* address = nullptr;
    if (bytes > 0) {
      memory = bytes_like(data, bytes + 256);
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(memory.get(), &address));
      address = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(address) + 255) / 256 * 256);
    }
    const int error = launch(problem, arithmetic, queue.device, address, queue.stream);
    if (error != 0) throw std::runtime_error("fused_densenet: " + describe(error));
  }

  // From torch's allocator, so that it is ordered by the stream and belongs to a graph that is being captured.
  static Tensor bytes_like(const Argument& data, size_t bytes) {
    const int64_t size = static_cast<int64_t>(bytes), stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                    static_cast<int32_t>(data.device), data.device_index, &handle));
    return Tensor(handle);
  }
};

template <class T>
T unboxed(StableIValue value) {
  if constexpr (std::is_same_v<T, Cuda::Tensor>) {
    return Cuda::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
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
}

}  // namespace fused_densenet
