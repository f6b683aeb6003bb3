// Of CUDA's runtime what the launching code calls: a device that gives a block 48 KiB of dynamic shared memory, and
// more to a kernel with leave, as a GPU's driver does.

#include <cuda_runtime_api.h>

#include "scheduler.h"

namespace cuda_host {

size_t most_shared(const void* kernel) {
  const auto leave = state.leave.find({kernel, state.device});
  return leave == state.leave.end() ? 48 << 10 : leave->second;
}

}  // namespace cuda_host

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::state.device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  if (which != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorNotSupported;
  *value = cuda_host::kMostShared;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > cuda_host::kMostShared) {
    return cudaErrorInvalidValue;
  }
  cuda_host::state.leave[{kernel, cuda_host::state.device}] = value;
  ++cuda_host::state.stats.attributes;
  return cudaSuccess;
}

}  // extern "C"
