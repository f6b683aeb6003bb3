// What Python calls: the primitives and the runner's state, with C linkage.

#include <utility>

#include "../../../csrc/cuda/launch.h"
#include "scheduler.h"

namespace fused_densenet {

// Kernels that are not linked are not supported.
#define FD_ABSENT(name, Problem)                                                                         \
  __attribute__((weak)) size_t name##_workspace(const Problem&, Arithmetic, const Device&) { return 0; } \
  __attribute__((weak)) int name(const Problem&, Arithmetic, const Device&, void*, void*) { return 801; }
#define FD_ABSENT_PREPARED(name, Problem)                                                            \
  __attribute__((weak)) Needs name##_needs(const Problem&, Arithmetic, const Device&) { return {}; } \
  __attribute__((weak)) int name(const Problem&, Arithmetic, const Device&, void*, void*, void*) { return 801; }
FD_ABSENT_PREPARED(place, Place)
FD_ABSENT(place_backward, PlaceBackward)
FD_ABSENT(norm_relu_pool, NormReluPool)
FD_ABSENT(norm_relu_pool_backward, NormReluPoolBackward)
FD_ABSENT(update_running, RunningUpdates)
FD_ABSENT_PREPARED(conv1x1_forward, Forward)
FD_ABSENT_PREPARED(conv3_forward, Forward)
FD_ABSENT(conv1x1_backward, Backward)
FD_ABSENT(conv3_backward, Backward)
__attribute__((weak)) int prepare(const Preparation*, int64_t, Arithmetic, void*) { return 801; }

extern "C" {

// A call alone: prepared, then launched.
#define FD_PRIMITIVE(name, Problem)                                                             \
  size_t cuda_host_sizeof_##name() { return sizeof(Problem); }                                  \
  size_t cuda_host_##name##_workspace(const Problem* f, int arithmetic, const Device* device) { \
    const Needs needs = launcher(*f).needs(*f, static_cast<Arithmetic>(arithmetic), *device);   \
    return needs.prepared + needs.workspace;                                                    \
  }                                                                                             \
  int cuda_host_##name(const Problem* f, int arithmetic, const Device* device, void* memory) {  \
    cuda_host::state.error.clear();                                                             \
    const Arithmetic a = static_cast<Arithmetic>(arithmetic);                                   \
    const Needs needs = launcher(*f).needs(*f, a, *device);                                     \
    if (needs.prepared > 0) {                                                                   \
      Preparation preparation = needs.preparation;                                              \
      preparation.at = memory;                                                                  \
      if (const int error = prepare(&preparation, 1, a, nullptr); error != 0) return error;     \
    }                                                                                           \
    void* const workspace = static_cast<unsigned char*>(memory) + needs.prepared;               \
    return launcher(*f).run(*f, a, *device, memory, workspace, nullptr);                        \
  }
FD_PRIMITIVE(place, Place)
FD_PRIMITIVE(place_backward, PlaceBackward)
FD_PRIMITIVE(norm_relu_pool, NormReluPool)
FD_PRIMITIVE(norm_relu_pool_backward, NormReluPoolBackward)
FD_PRIMITIVE(update_running, RunningUpdates)
FD_PRIMITIVE(forward, Forward)
FD_PRIMITIVE(backward, Backward)

const char* cuda_host_error() { return cuda_host::state.error.c_str(); }
void cuda_host_seed(uint64_t seed) { cuda_host::state.seed = seed; }
int cuda_host_no_launch(const cuda_host::Task*) { return 0; }
void cuda_host_launcher(int (*launcher)(const cuda_host::Task*)) { cuda_host::state.launcher = launcher; }
void cuda_host_meanwhile(void (*meanwhile)()) { cuda_host::state.meanwhile = meanwhile; }
void cuda_host_device(int device) { cuda_host::state.device = device; }
void cuda_host_take_stats(cuda_host::Stats* stats) { *stats = std::exchange(cuda_host::state.stats, {}); }

}  // extern "C"
}  // namespace fused_densenet
