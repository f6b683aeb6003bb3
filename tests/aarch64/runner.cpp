// A program that executes the CPU's primitives for somebody else on another machine than theirs. Each buffer lies
// between pages that cannot be touched: right behind one or, `at_end`, right before one.
//
// With the argument "sets" it prints the instruction sets of the kernels for float32 and bfloat16 instead.

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "../../csrc/cpu/params.h"
#include "../serving.h"

namespace {

using namespace fused_densenet;

struct Head {
  char name[32];
  int32_t dtype, threads;
  uint64_t measures, at_end;  // whether only the workspace is asked for; whether buffers end where their pages do
};

const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));

uint64_t pages_of(uint64_t bytes) { return (bytes + page - 1) / page * page; }

void* allocate(const Head& head, uint64_t bytes) {
  const uint64_t size = pages_of(bytes);
  void* memory = mmap(nullptr, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) exit(1);
  char* begin = static_cast<char*>(memory) + page;
  if (size > 0 && mprotect(begin, size, PROT_READ | PROT_WRITE) != 0) exit(1);
  return head.at_end ? begin + size - bytes : begin;
}

void release(void* memory, uint64_t bytes) {
  const uint64_t begin = reinterpret_cast<uint64_t>(memory) / page * page - page;
  munmap(reinterpret_cast<void*>(begin), pages_of(bytes) + 2 * page);
}

// The tasks of a kernel one after the other, from the first or from the last: threads may take them in any order.
void run_forwards(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}
void run_backwards(int64_t count, void (*body)(void*, int64_t), void* context) {
  while (count > 0) body(context, --count);
}

template <class Problem>
serving::Answer answer(const Head& head, const void* problem, uint64_t bytes, void* workspace) {
  if (bytes != sizeof(Problem)) return {0, std::string(head.name) + " differs from csrc/problem.h"};
  const auto& typed = *static_cast<const Problem*>(problem);
  const Entry<Problem>& kernel = entry(kernels_for(static_cast<DType>(head.dtype), "DEFAULT"), typed);
  if (head.measures) return {static_cast<int64_t>(kernel.workspace(typed, head.threads)), ""};
  const Memory memory{workspace, kernel.workspace(typed, head.threads)};
  kernel.run(typed, memory, {head.at_end ? run_backwards : run_forwards, head.threads});
  return {0, ""};
}

serving::Answer execute(const Head& head, const void* problem, uint64_t bytes, void* workspace) {
  const std::string name = head.name;
  if (name == "place") return answer<Place>(head, problem, bytes, workspace);
  if (name == "place_backward") return answer<PlaceBackward>(head, problem, bytes, workspace);
  if (name == "norm_relu_pool") return answer<NormReluPool>(head, problem, bytes, workspace);
  if (name == "norm_relu_pool_backward") return answer<NormReluPoolBackward>(head, problem, bytes, workspace);
  if (name == "forward") return answer<Forward>(head, problem, bytes, workspace);
  if (name == "strided_conv") return answer<StridedConv>(head, problem, bytes, workspace);
  if (name == "backward") return answer<Backward>(head, problem, bytes, workspace);
  return {0, name + " is no primitive"};
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "sets") == 0) {
    std::printf("%s %s\n", kernels_name(DType::f32, "DEFAULT"), kernels_name(DType::bf16, "DEFAULT"));
    return 0;
  }
  serving::serve<Head>(allocate, release, execute);
}
