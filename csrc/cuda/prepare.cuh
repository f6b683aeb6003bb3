// What is done once before the calls of a program: weights packed as kernels read them, counters of blocks at zero.
#pragma once

#include "forward.cuh"

namespace fused_densenet {

// prepare.cu: how many numbers of what is multiplied a packed weight has.
// Rows of neighbouring input channels, one for each output, filled up with zeros to whole chunks.
Packing pack_rows(const Forward& f, Arithmetic arithmetic);
// Fragments in the order in which warps multiply them, as [block of columns][M::kBytes of channels][tap][group of 16
// columns], `groups` to a block; zero where there is no channel.
Packing pack_fragments(const Forward& f, int groups, Arithmetic arithmetic);

// Bytes, whole lines.
size_t packed_bytes(const Packing& packing, Arithmetic arithmetic);

}  // namespace fused_densenet
