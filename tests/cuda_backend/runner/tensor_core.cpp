// Tensor-core products, ldmatrix, and asynchronous copies. Fragments as the PTX ISA's tables give them.

#include <cstring>

#include "cuda_host.h"
#include "scheduler.h"

namespace cuda_host {
namespace {

float half_of(uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); }
float bfloat_of(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
float tf32_of(uint32_t bits) { return std::bit_cast<float>(bits & 0xFFFFE000u); }

// Words 0 to 3 of a lane are its part of a (16 x Depth), 4 and 5 its part of b (Depth x 8).
template <int Depth, float (*number)(uint32_t)>
void multiply(Meeting::Round& round) {
  constexpr int each = Depth / 8, bits = 32 / each;
  float a[16][Depth], b[Depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = lane & 3;
    for (int e = 0; e < each; ++e) {
      const auto part = [&](int word) {
        const uint32_t w = round.words[lane][word];
        return number(each == 1 ? w : w >> (bits * e) & 0xFFFFu);
      };
      const int k = each * t + e, far = k + Depth / 2;
      a[g][k] = part(0);
      a[g + 8][k] = part(1);
      a[g][far] = part(2);
      a[g + 8][far] = part(3);
      b[k][g] = part(4);
      b[far][g] = part(5);
    }
  }
  for (int i = 0; i < 16; ++i) {
    float sum[8] = {};
    for (int k = 0; k < Depth; ++k) {
      for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * b[k][j];
    }
    std::memcpy(round.product[i], sum, sizeof sum);
  }
  ++state.stats.mma;
}

template <int Depth, float (*number)(uint32_t)>
void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t words[] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Meeting::Round& round = meet(~0u, what, 0, words, 6, multiply<Depth, number>);
  const int g = lane() >> 2, t = lane() & 3;
  for (int i = 0; i < 4; ++i) d[i] += round.product[g + 8 * (i >> 1)][2 * t + (i & 1)];
}

// Eight rows of 16 bytes are read at once if they lie in eight different groups of four banks.
void count_conflicts(const Meeting::Round& round, int matrix) {
  int used[8] = {}, most = 1;
  for (int i = 0; i < 8; ++i) {
    const uint32_t row = round.words[8 * matrix + i][4];
    bool again = false;  // rows at the same address are read once
    for (int j = 0; j < i; ++j) again |= round.words[8 * matrix + j][4] == row;
    if (!again) most = std::max(most, ++used[row & 7]);
  }
  state.stats.ldmatrix_conflicts += most - 1;
}

}  // namespace

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<16, bfloat_of>("mma of bf16", d, a, b);
}
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<16, half_of>("mma of f16", d, a, b); }
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<8, tf32_of>("mma of tf32", d, a, b);
}

void load_matrices(const void* p, const uint32_t (&row)[4], uint32_t* r, int count, bool transposed) {
  const uint32_t words[] = {row[0], row[1], row[2], row[3], uint32_t(reinterpret_cast<uintptr_t>(p) >> 4)};
  const Meeting::Round& round = meet(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", 0, words, 5);
  const int lane = current->lane(), g = lane >> 2, t = lane & 3;
  for (int m = 0; m < count; ++m) {
    if (lane == 0) count_conflicts(round, m);
    if (!transposed) {
      r[m] = round.words[8 * m + g][t];
      continue;
    }
    const auto number = [&](int i) { return round.words[8 * m + i][g / 2] >> (16 * (g & 1)) & 0xFFFFu; };
    r[m] = number(2 * t) | number(2 * t + 1) << 16;
  }
  if (lane == 0) state.stats.ldmatrix += count;
}

void copy_begins(void* to, const void* from, int bytes, int valid) {
  current->copies.push_back({to, from, bytes, valid});
  ++state.stats.cp_async;
}

void cp_async_commit() { current->groups.push_back(current->copies.size()); }

void copies_arrive(int keep, CopyFunction* copy) {
  std::vector<Copy>& copies = current->copies;
  std::vector<size_t>& groups = current->groups;
  if (int(groups.size()) <= keep) return;
  const size_t done = groups.size() - keep, end = groups[done - 1];
  for (size_t i = 0; i < end; ++i) copy(copies[i].to, copies[i].from, copies[i].bytes, copies[i].valid);
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + done);
  for (size_t& group : groups) group -= end;
}

}  // namespace cuda_host
