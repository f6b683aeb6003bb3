// The state of the launch that runs, for the parts of the runner. Kernels see engine.h only.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "fibers.h"

namespace cuda_host {

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

// A CUDA thread.
struct Thread {
  Fiber fiber;
  uint3 index{};
  int id = 0;
  bool done = false;
  const char* at = "running";
  int line = 0;
  std::vector<Copy> copies;    // cp.async that nobody waited for
  std::vector<size_t> groups;  // copies before the end of each committed group
  int lane() const { return id & 31; }
  int warp() const { return id >> 5; }
};

using Words = std::array<uint32_t, 8>;

// A meeting of the lanes of one mask; what they brought is kept until the meeting after the next.
struct Meeting {
  struct Round {
    std::array<Words, 32> words;
    alignas(64) float product[16][8];
  };
  unsigned arrived = 0;
  int count = 0;
  const char* what = nullptr;
  int line = 0;
  Round rounds[2];
};

struct Warp {
  Meeting whole;
  std::map<unsigned, Meeting> parts;
};

struct State {
  std::string error;
  Stats stats{};
  uint64_t seed = 0;  // 0: threads take turns in order; else one warp runs as far ahead as it can

  int (*launcher)(const Task*) = nullptr;  // where set, it gets the launches; none is executed here
  void (*meanwhile)() = nullptr;           // where set, called once before a launch: another host thread
  int device = 0;
  std::map<std::pair<const void*, int>, size_t> leave;  // bytes of dynamic shared memory by kernel and device
  const Task* task = nullptr;
  int threads = 0, living = 0;
  std::vector<std::unique_ptr<Thread>> pool;
  Thread outside;                     // whoever called launch
  std::array<Thread*, 1024> ready{};  // a ring: `waiting` threads from `first`
  int first = 0, waiting = 0;
  std::vector<Warp> warps;
  std::array<uint64_t, 32> priority{};
  uint64_t random = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;

  int barrier_arrived = 0, barrier_line = 0, barrier_count = 0;
  int parity = 0;  // of the running block
  struct {
    char barrier[2], begin, end, fence, block[2], warp[2][32];
  } order{};  // objects of release and acquire
};

constexpr int kMostShared = 227 << 10;  // of a block

extern State state;
extern Thread* current;  // null outside of kernels

size_t most_shared(const void* kernel);  // runtime.cpp
void make_ready(Thread* thread);
void suspend(bool ends = false);  // until somebody makes this thread ready
bool in_shared(const void* p, size_t bytes);
Meeting::Round& meet(unsigned mask, const char* what, int line, const uint32_t* words, int count,
                     void (*last)(Meeting::Round&) = nullptr);

}  // namespace cuda_host
