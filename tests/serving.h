// What programs have in common that execute primitives for somebody else (served.py): they read requests from their
// input and write results to their output.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace serving {

// Addresses in the problem are those of the one who asks.
struct Operands {
  uint64_t problem_bytes, buffers, workspace;
};

struct Buffer {
  uint64_t begin, bytes;
  char* copy;
};

struct Answer {
  int64_t code;
  std::string error;  // empty for none
};

inline void read_exactly(void* to, size_t bytes) {
  if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0);
}

inline char* relocated(const std::vector<Buffer>& buffers, uint64_t address) {
  for (const Buffer& buffer : buffers) {
    if (address >= buffer.begin && address < buffer.begin + buffer.bytes) {
      return buffer.copy + (address - buffer.begin);
    }
  }
  return nullptr;
}

// Requests begin with a Head, which says how to execute them. Every buffer has memory of its own,
// allocate(head, bytes) until release(address, bytes); execute(head, problem, problem_bytes, workspace) gives the
// Answer.
template <class Head, class Allocate, class Release, class Execute>
void serve(Allocate allocate, Release release, Execute execute) {
  for (;;) {
    Head head;
    read_exactly(&head, sizeof head);
    Operands operands;
    read_exactly(&operands, sizeof operands);
    std::vector<uint64_t> problem(operands.problem_bytes / 8);
    read_exactly(problem.data(), operands.problem_bytes);
    std::vector<Buffer> buffers(operands.buffers);
    for (Buffer& buffer : buffers) {
      read_exactly(&buffer.begin, 16);
      buffer.copy = static_cast<char*>(allocate(head, buffer.bytes));
      read_exactly(buffer.copy, buffer.bytes);
    }
    // Sizes and strides are never as large as an address.
    for (uint64_t& word : problem) {
      if (char* pointer = relocated(buffers, word)) word = reinterpret_cast<uint64_t>(pointer);
    }
    const Answer answer = execute(head, problem.data(), operands.problem_bytes, relocated(buffers, operands.workspace));
    const uint64_t sizes[] = {static_cast<uint64_t>(answer.code), answer.error.size()};
    fwrite(sizes, sizeof sizes, 1, stdout);
    fwrite(answer.error.data(), 1, answer.error.size(), stdout);
    for (const Buffer& buffer : buffers) {
      fwrite(buffer.copy, 1, buffer.bytes, stdout);
      release(buffer.copy, buffer.bytes);
    }
    fflush(stdout);
  }
}

}  // namespace serving
