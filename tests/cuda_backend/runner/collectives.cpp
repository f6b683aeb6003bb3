// Warp collectives: lanes meet, each brings words and takes what all brought.

#include <algorithm>
#include <bit>
#include <cstring>

#include "scheduler.h"

namespace cuda_host {

// Waits for all lanes of `mask` at the same place; `last` is called once, by the lane that comes last.
Meeting::Round& meet(unsigned mask, const char* what, int line, const uint32_t* words, int count,
                     void (*last)(Meeting::Round&)) {
  Thread* thread = current;
  const int lane = thread->lane(), warp = thread->warp(), lanes = state.threads - 32 * warp;
  const unsigned exist = lanes >= 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %08x", what, lane, mask);
  if (mask != ~0u && mask & ~exist) fail("%s: mask %08x names lanes that do not exist", what, mask);
  mask &= exist;
  Warp& all = state.warps[warp];
  Meeting& meeting = mask == ~0u ? all.whole : all.parts[mask];
  if (meeting.arrived && (meeting.line != line || std::strcmp(meeting.what, what) != 0)) {
    fail("%s in line %d, other lanes of the warp wait at %s in line %d", what, line, meeting.what, meeting.line);
  }
  meeting.what = what;
  meeting.line = line;
  Meeting::Round& round = meeting.rounds[meeting.count & 1];
  for (int i = 0; i < count; ++i) round.words[lane][i] = words[i];
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.count;
    if (last) last(round);
    for (unsigned rest = mask & ~(1u << lane); rest; rest &= rest - 1) {
      make_ready(state.pool[32 * warp + std::countr_zero(rest)].get());
    }
  } else {
    thread->at = what;
    thread->line = line;
    suspend();
    thread->at = "running";
  }
  return round;
}

void warp_barrier(unsigned mask, int line) {
  Warp& warp = state.warps[current->warp()];
  const int parity = (mask == ~0u ? warp.whole : warp.parts[mask]).count & 1;
  void* order = &state.order.warp[parity][current->warp()];
  release(order);
  meet(mask, "__syncwarp", line, nullptr, 0);
  acquire(order);
}

uint64_t shuffle(unsigned mask, uint64_t value, int from, int line) {
  const uint32_t words[] = {uint32_t(value), uint32_t(value >> 32)};
  const Meeting::Round& round = meet(mask, "a shuffle", line, words, 2);
  ++state.stats.shuffles;
  if (from < 0 || from > 31 || !(mask >> from & 1))
    fail("a shuffle in line %d reads lane %d, not in its mask", line, from);
  return round.words[from][0] | uint64_t(round.words[from][1]) << 32;
}

unsigned ballot(unsigned mask, bool value, int line) {
  const uint32_t word = value;
  const Meeting::Round& round = meet(mask, "a vote", line, &word, 1);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) result |= round.words[i][0] << i;
  }
  return result;
}

}  // namespace cuda_host
