// A program that executes primitives for somebody else, so that it can be built with sanitizers: reads requests from
// its input, writes results to its output. Each buffer gets memory of its own, of exactly its size.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../../csrc/cuda/launch.h"
#include "scheduler.h"

namespace {

using namespace fused_densenet;

constexpr size_t kAlignment = 512;

struct Request {
  char name[32];
  int arithmetic;
  Device device;
  uint64_t seed, problem_bytes, buffers, workspace;
};

struct Buffer {
  uint64_t begin, bytes;
  char* copy;
};

void read_exactly(void* to, size_t bytes) {
  if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0);
}

char* relocated(const std::vector<Buffer>& buffers, uint64_t address) {
  for (const Buffer& buffer : buffers) {
    if (address >= buffer.begin && address < buffer.begin + buffer.bytes) {
      return buffer.copy + (address - buffer.begin);
    }
  }
  return nullptr;
}

int execute(const Request& request, const void* problem, void* workspace) {
  const auto arithmetic = static_cast<Arithmetic>(request.arithmetic);
  const std::string name = request.name;
  // A call alone: prepared, then launched.
  const auto run = [&](auto* typed) {
    const auto call = launcher(*typed);
    const Needs needs = call.needs(*typed, arithmetic, request.device);
    if (needs.prepared > 0) {
      Preparation preparation = needs.preparation;
      preparation.at = workspace;
      if (const int error = prepare(&preparation, 1, arithmetic, nullptr); error != 0) return error;
    }
    void* const scratch = static_cast<unsigned char*>(workspace) + needs.prepared;
    return call.run(*typed, arithmetic, request.device, workspace, scratch, nullptr);
  };
  if (name == "place") return run(static_cast<const Place*>(problem));
  if (name == "place_backward") return run(static_cast<const PlaceBackward*>(problem));
  if (name == "norm_relu_pool") return run(static_cast<const NormReluPool*>(problem));
  if (name == "norm_relu_pool_backward") return run(static_cast<const NormReluPoolBackward*>(problem));
  if (name == "forward") return run(static_cast<const Forward*>(problem));
  if (name == "backward") return run(static_cast<const Backward*>(problem));
  return -1;
}

}  // namespace

int main() {
  for (;;) {
    Request request;
    read_exactly(&request, sizeof request);
    std::vector<uint64_t> problem(request.problem_bytes / 8);
    read_exactly(problem.data(), request.problem_bytes);
    std::vector<Buffer> buffers(request.buffers);
    for (Buffer& buffer : buffers) {
      read_exactly(&buffer.begin, 16);
      void* memory = nullptr;
      if (posix_memalign(&memory, kAlignment, std::max<uint64_t>(buffer.bytes, 1))) return 1;
      buffer.copy = static_cast<char*>(memory);
      read_exactly(buffer.copy, buffer.bytes);
    }
    // Sizes and strides are never as large as an address.
    for (uint64_t& word : problem) {
      if (char* pointer = relocated(buffers, word)) word = reinterpret_cast<uint64_t>(pointer);
    }
    cuda_host::state.seed = request.seed;
    const int code = execute(request, problem.data(), relocated(buffers, request.workspace));
    const std::string& error = cuda_host::state.error;
    const uint64_t answer[] = {uint64_t(code), error.size()};
    fwrite(answer, sizeof answer, 1, stdout);
    fwrite(error.data(), 1, error.size(), stdout);
    for (const Buffer& buffer : buffers) {
      fwrite(buffer.copy, 1, buffer.bytes, stdout);
      free(buffer.copy);
    }
    fflush(stdout);
  }
}
