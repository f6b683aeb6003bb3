// A program that executes primitives for somebody else, so that it can be built with sanitizers. Each buffer gets
// memory of its own, of exactly its size.

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../../../csrc/cuda/launch.h"
#include "../../serving.h"
#include "scheduler.h"

namespace {

using namespace fused_densenet;

constexpr size_t kAlignment = 512;

struct Head {
  char name[32];
  int arithmetic;
  Device device;
  uint64_t seed;
};

int execute(const Head& head, const void* problem, void* workspace) {
  const auto arithmetic = static_cast<Arithmetic>(head.arithmetic);
  const std::string name = head.name;
  // A call alone: prepared, then launched.
  const auto run = [&](auto* typed) {
    const auto call = launcher(*typed);
    const Needs needs = call.needs(*typed, arithmetic, head.device);
    if (needs.prepared > 0) {
      Preparation preparation = needs.preparation;
      preparation.at = workspace;
      if (const int error = prepare(&preparation, 1, arithmetic, nullptr); error != 0) return error;
    }
    void* const scratch = static_cast<unsigned char*>(workspace) + needs.prepared;
    return call.run(*typed, arithmetic, head.device, workspace, scratch, nullptr);
  };
  if (name == "place") return run(static_cast<const Place*>(problem));
  if (name == "place_backward") return run(static_cast<const PlaceBackward*>(problem));
  if (name == "norm_relu_pool") return run(static_cast<const NormReluPool*>(problem));
  if (name == "norm_relu_pool_backward") return run(static_cast<const NormReluPoolBackward*>(problem));
  if (name == "forward") return run(static_cast<const Forward*>(problem));
  if (name == "backward") return run(static_cast<const Backward*>(problem));
  return -1;
}

void* allocate(const Head&, uint64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, std::max<uint64_t>(bytes, 1))) exit(1);
  return memory;
}

}  // namespace

int main() {
  serving::serve<Head>(
      allocate, [](void* memory, uint64_t) { free(memory); },
      [](const Head& head, const void* problem, uint64_t, void* workspace) -> serving::Answer {
        cuda_host::state.seed = head.seed;
        const int code = execute(head, problem, workspace);
        if (code == 0) return {0, ""};
        return {code, std::string(head.name) + ": CUDA error " + std::to_string(code) + ": " + cuda_host::state.error};
      });
}
