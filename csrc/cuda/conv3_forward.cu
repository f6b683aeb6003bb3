// The convolution over neighbouring pixels, 3 x 3 above all: out[p, k] = sum over taps and c of
// a[p + tap, c] w[k, c, tap], with a = relu(norm(x)) inside the image and zero outside it.
//
// A tile is a box of pixels of some images. Of 64 bytes of channels at a time the box and its halo are copied into
// shared memory, normalised and rectified there once, and multiplied with every tap: a tap is an offset of the rows
// that ldmatrix reads. The next channels, or the next box's first, are under way meanwhile. For 16 x 16 pixels a stage
// is 18 x 18 rows x 80 bytes = 25 KiB, 1.27 of the image; with two stages, and their weights, a block has 99 KiB, and
// two fit a multiprocessor of sm_90, as many as registers allow. It is bound by tensor cores and by the fragments they
// need: with k = 32, a warp's 64 pixels x 32 channels take four fragments of x and two of weights, 512 bytes each, for
// 16 instructions.
//
// Weights are packed in the order of fragments, so that a warp reads each fragment with one instruction, one step
// ahead. A contiguous weight, whose channels are nine elements apart, would have to be packed anyway, by every block.
// Those of a stage (18 KiB for 32 channels out, 3 x 3) are copied behind its pixels where as many blocks share a
// multiprocessor as would without: the four warps read them there, and the second-level cache gives them once. Else, on
// GPUs with less shared memory and for more weights, they are read where they lie, and what the first-level cache has
// room for stays in it: no kernel size has too many weights.
//
// Layers with too few boxes get smaller ones, and if these do not suffice either, splits of the input channels.
#include <type_traits>

#include "boxes.cuh"
#include "forward.cuh"
#include "prepare.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kStages = 2, kTables = kStages + 1;
constexpr int kMostGroups = 3;

// Before sm_80 copies take registers, and nobody works meanwhile.
#ifdef FD_BEFORE_SM80
constexpr bool kCopiesWeights = false;
#else
constexpr bool kCopiesWeights = true;
#endif

struct Conv3 {
  const unsigned char* x;
  int pixel;  // bytes
  Norm norm;
  float slope;
  const unsigned char* weights;
  Box image, kernel, box, halo, tiles;  // tiles: boxes in each direction
  int in, split_channels, access, groups;
  int stage_weights;  // bytes of weights in a stage; none where they are read where they lie
  Output output;
};

// The dynamic shared memory of a block, in bytes from its beginning.
struct Layout {
  int vector_channels, columns, halo, rows, taps, offsets;
  int statistics, staging, tables, rows_at, offsets_at, stages, stage, bytes;

  // A product takes `depth` bytes of a row.
  __host__ __device__ Layout(const Conv3& f, int tiles, int element, int depth, int staging_bytes) {
    const int channels = kStage / element;
    vector_channels = (f.split_channels + channels - 1) / channels * channels;
    columns = f.groups * kGroup;
    halo = f.halo.volume();
    rows = kWarps * tiles * 16;
    taps = f.kernel.volume();
    offsets = kStage / depth * taps;
    statistics = NormVectors::kCount * vector_channels * int{sizeof(float)};
    staging = statistics + static_cast<int>(Statistics::bytes(columns, kWarps, f.output.bias));
    tables = staging + kWarps * staging_bytes;
    rows_at = tables + kTables * halo * int{sizeof(int)};
    offsets_at = rows_at + rows * int{sizeof(int)};
    stages = (offsets_at + offsets * int{sizeof(int)} + 127) / 128 * 128;
    stage = halo * kPitch + f.stage_weights;
    bytes = stages + kStages * stage;
  }
};

__device__ Box origin_of(const Conv3& f, int tile) {
  const Box at = place_in(f.tiles, tile);
  return {at.n * f.box.n, at.d * f.box.d, at.h * f.box.h, at.w * f.box.w};
}

// Which pixel of the image each place of a tile's halo is.
__device__ void fill_table(const Conv3& f, int tile, int* table, int places) {
  const Box origin = origin_of(f, tile);
#pragma unroll 1
  for (int i = threadIdx.x; i < places; i += kThreads) {
    Box at = place_in(f.halo, i);
    at = {origin.n + at.n, origin.d + at.d - f.kernel.d / 2, origin.h + at.h - f.kernel.h / 2,
          origin.w + at.w - f.kernel.w / 2};
    const bool inside = at.n < f.image.n && at.d >= 0 && at.d < f.image.d && at.h >= 0 && at.h < f.image.h &&
                        at.w >= 0 && at.w < f.image.w;
    table[i] = inside ? index_in(f.image, at) : kOutside;
  }
}

__device__ int pixels_of(const Conv3& f, int tile) {
  const Box origin = origin_of(f, tile);
  return min(f.box.n, f.image.n - origin.n) * min(f.box.d, f.image.d - origin.d) * min(f.box.h, f.image.h - origin.h) *
         min(f.box.w, f.image.w - origin.w);
}

// Blocks of a multiprocessor that registers are enough for.
template <int MI, int NT>
constexpr int kResident = MI < 4 && NT < 6 ? 3 : 2;

// MI tiles of 16 pixels and NT tiles of 8 channels in a warp: as many channels as there are, or one tile of 8 more; a
// test of each product costs more instructions than the products.
template <Arithmetic A, int MI, int NT>
__global__ void __launch_bounds__(kThreads, kResident<MI, NT>) conv3_kernel(const Conv3 f) {
  using M = Product<A>;
  using T = typename M::T;
  constexpr int element = sizeof(T), channels = kStage / element, per_chunk = Chunk<T>::size;
  using Tile = WarpTile<MI, NT>;
  DYN_SMEM(shared);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const Layout layout(f, MI, element, M::kBytes, Tile::template staging_bytes<T>());
  const NormVectors vectors{{reinterpret_cast<float*>(shared), layout.vector_channels}};
  const Statistics statistics{reinterpret_cast<float*>(shared + layout.statistics), layout.columns, kWarps};
  unsigned char* staging = shared + layout.staging + warp * static_cast<int>(Tile::template staging_bytes<T>());
  int* row_places = reinterpret_cast<int*>(shared + layout.rows_at);
  int* offsets = reinterpret_cast<int*>(shared + layout.offsets_at);  // of a stage's products: channels, then taps
  const auto stage_at = [&](int stage) { return shared + layout.stages + stage * layout.stage; };
  const auto table = [&](int i) { return reinterpret_cast<int*>(shared + layout.tables) + i * layout.halo; };

  const int first_channel = static_cast<int>(blockIdx.z) * f.split_channels;
  const int split_channels = min(f.split_channels, f.in - first_channel);
  const int taps = layout.taps, own_places = f.box.volume();
  const int tiles = f.tiles.volume(), grid = static_cast<int>(gridDim.x);
  const int steps = (split_channels + channels - 1) / channels;
  const int64_t all_steps = int64_t{(tiles - static_cast<int>(blockIdx.x) + grid - 1) / grid} * steps;
  // Tiles of 16 rows go round the warps.
  const int own_tiles = clamp(((own_places + 15) / 16 - warp + kWarps - 1) / kWarps, 0, MI);
  Tile tile;
  tile.local = 0;
  tile.first = static_cast<int>(blockIdx.y) * layout.columns;
  tile.columns = clamp(f.output.channels - tile.first, 0, layout.columns);

  vectors.load<T>(f.norm, first_channel, split_channels);
  const float* const bias = statistics.load_bias<T>(f.output, tile.first);
#pragma unroll 1
  for (int i = tid; i < layout.rows; i += kThreads) {
    row_places[i] = i < own_places ? index_in(f.halo, place_in(f.box, i)) : kOutside;
  }
#pragma unroll 1
  for (int i = tid; i < layout.offsets; i += kThreads) {
    offsets[i] = index_in(f.halo, place_in(f.kernel, i % taps)) * kPitch + i / taps * M::kBytes;
  }
  fill_table(f, blockIdx.x, table(0), layout.halo);
  __syncthreads();
  const bool split = MI < 4 && f.output.partial != nullptr;  // large tiles have no registers left for splits
  tile.start(split ? nullptr : bias);

  const int centre = index_in(f.halo, {0, f.kernel.d / 2, f.kernel.h / 2, f.kernel.w / 2});
  const int chunk = tid % (kStage / kChunk), own_row = own_row_of(tid);
  constexpr int row_step = kThreads / (kStage / kChunk);
  // Chunks of a stage beyond the last product are neither copied nor normalised.
  const int all_bytes = (split_channels * element + M::kBytes - 1) / M::kBytes * M::kBytes;
  const auto places_of = [&](int step) { return step * kStage + chunk * kChunk < all_bytes ? layout.halo : 0; };
  int left_offset[MI][M::kRows];
#pragma unroll
  for (int i = 0; i < MI; ++i) {
#pragma unroll
    for (int r = 0; r < M::kRows; ++r) {
      const int place = row_places[(i * kWarps + warp) * 16 + M::left_row(lane, r)];
      left_offset[i][r] = max(place, 0) * kPitch + M::left_offset(lane);
    }
  }

  // A step's place in its tile, and which table the tile has.
  struct Cursor {
    int step, table;
    __device__ bool advance(int steps) {
      if (++step < steps) return false;
      step = 0;
      table = table + 1 == kTables ? 0 : table + 1;
      return true;
    }
  };
  Cursor loading{0, 0}, preparing{0, 0}, consuming{0, 0};
  int loading_tile = static_cast<int>(blockIdx.x), consuming_tile = loading_tile, count = 0;

  // Weights lie as [block of columns][M::kBytes of channels][tap][group of columns], in the order of use.
  constexpr int weight_step = NT / 2 * M::kFragments;
  const int all_products = (f.in * element + M::kBytes - 1) / M::kBytes;
  const int stage_weights = kStage / M::kBytes * taps * weight_step;
  const unsigned char* const all_weights =
      f.weights + (int64_t{blockIdx.y} * all_products + first_channel * element / M::kBytes) * taps * weight_step;
  const bool weights_in_stages = kCopiesWeights && f.stage_weights > 0;
  const auto weights_at = [&](int stage) { return stage_at(stage) + layout.halo * kPitch; };
  const auto products_of = [&](int step) {
    const int bytes = min(kStage, (split_channels - step * channels) * element);
    return (bytes + M::kBytes - 1) / M::kBytes * taps;
  };

  const auto load = [&](int stage) {
    const int channel = loading.step * channels + chunk * per_chunk;
    const int valid = clamp((split_channels - channel) * element, 0, kChunk);
    const unsigned char* x = f.x + int64_t{first_channel + channel} * element;
    const int* pixels = table(loading.table);
    unsigned char* to = stage_at(stage) + own_row * kPitch + chunk * kChunk;
    const int end = places_of(loading.step);
    with_access(f.access, [&](auto width) {
      [[maybe_unused]] constexpr int together = decltype(width)::value < 16 ? 1 : 4;
#pragma unroll together
      for (int place = own_row; place < end; place += row_step, to += row_step * kPitch) {
        const int p = pixels[place];
        copy_chunk<decltype(width)::value>(to, bytes_behind(x, p, f.pixel), p >= 0 ? valid : 0);
      }
    });
    if (weights_in_stages) {
      const unsigned char* from = all_weights + int64_t{loading.step} * stage_weights;
      unsigned char* const weights_to = weights_at(stage);
#pragma unroll 4
      for (int at = tid * kChunk, end = products_of(loading.step) * weight_step; at < end; at += kThreads * kChunk) {
        copy_chunk<kChunk>(weights_to + at, from + at, kChunk);
      }
    }
    if (loading.advance(steps)) {
      loading_tile += grid;
      if (loading_tile < tiles) fill_table(f, loading_tile, table(loading.table), layout.halo);
    }
  };

  const auto prepare = [&](int stage) {
    if (multiplied_as_it_is<A>(f.norm)) return;
    const Affine<A> affine(vectors, preparing.step * channels + chunk * per_chunk);
    const int* pixels = table(preparing.table);
    unsigned char* x = stage_at(stage) + own_row * kPitch + chunk * kChunk;
    const int end = places_of(preparing.step);
    with_activation(f.slope, [&](auto activation) {
      for (int place = own_row; place < end; place += row_step, x += row_step * kPitch) {
        if (pixels[place] >= 0) store_shared(x, affine.activated(x, activation));
      }
    });
    preparing.advance(steps);
  };

  const auto pixel = [&](int i, int row) -> int64_t {
    const int place = row_places[(i * kWarps + warp) * 16 + row];
    return place < 0 ? place : table(consuming.table)[place + centre];
  };

  const auto store_tile = [&] {
    tile.activate(f.output.slope);
    tile.template store<T>(f.output, staging, pixel);
    if (f.output.moments.data == nullptr) return;
    const int valid = pixels_of(f, consuming_tile);
    tile.add_moments(statistics, warp, count == 0, valid, pixel);
    count += valid;
  };
  const auto finish_tile = [&] {
    if (split) {
      tile.store_partial(f.output, consuming_tile);
    } else {
      store_tile();
    }
    tile.start(split ? nullptr : bias);
    consuming_tile += grid;
  };

  const bool last_exists = 8 * (NT - 1) < tile.columns;

  struct Fragments {
    typename M::Left a[MI];
    typename M::Right b[NT / 2];
  };

  const auto multiply_by = [&](auto global, int stage, const unsigned char* weights, float (&sum)[MI][NT][4]) {
    const unsigned char* rows = stage_at(stage);
    const int* offset = offsets;
    const auto fetch = [&](Fragments& to) {
      const unsigned char* at = rows + *offset++;
#pragma unroll
      for (int j = 0; j < NT / 2; ++j)
        M::template load_packed<decltype(global)::value>(to.b[j], weights + j * M::kFragments);
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        if (i < own_tiles) M::load(to.a[i], at, left_offset[i]);
      }
      weights += weight_step;
    };
    const auto add_products = [&](const Fragments& from) {
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        if (i >= own_tiles) break;
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          if (j + 1 < NT || last_exists) M::multiply(sum[i][j], from.a[i], from.b[j / 2], j % 2);
        }
      }
    };
    int remaining = products_of(consuming.step);
    if constexpr (M::kApart) {
      Fragments only;
      for (; remaining > 0; --remaining) {
        fetch(only);
        add_products(only);
      }
    } else {
      // One step's fragments are on their way while the other's are multiplied.
      Fragments even, odd;
      fetch(even);
      while (true) {
        if (remaining > 1) fetch(odd);
        add_products(even);
        if (--remaining == 0) break;
        if (remaining > 1) fetch(even);
        add_products(odd);
        if (--remaining == 0) break;
      }
    }
  };

  const auto multiply = [&](int stage, float (&sum)[MI][NT][4]) {
    const int own = M::packed_offset(lane);
    if (weights_in_stages) {
      multiply_by(std::false_type(), stage, weights_at(stage) + own, sum);
    } else {
      multiply_by(std::true_type(), stage, all_weights + int64_t{consuming.step} * stage_weights + own, sum);
    }
  };

  const auto consume = [&](int stage) {
    if constexpr (M::kApart) {
      Tile part;
      part.clear();
      multiply(stage, part.sum);
      tile.add(part);
    } else {
      multiply(stage, tile.sum);
    }
    if (consuming.step + 1 == steps) finish_tile();
    consuming.advance(steps);
  };

  pipeline(all_steps, kStages, load, prepare, consume);
  if (split) {
    if (!adds_splits(f.output, reinterpret_cast<unsigned*>(statistics.part(0, 0)))) return;
    for (consuming_tile = blockIdx.x; consuming_tile < tiles; consuming_tile += grid) {
      __syncthreads();
      fill_table(f, consuming_tile, table(consuming.table), layout.halo);
      __syncthreads();
      tile.start(bias);
      tile.add_partials(f.output, consuming_tile);
      store_tile();
    }
  }
  if (f.output.moments.data != nullptr) {
    store_statistics(statistics, f.output.moments, static_cast<int>(blockIdx.x), tile.first, count);
  }
}

struct Plan {
  Conv3 kernel;
  ForwardPlan shared;
  bool large;
  dim3 grid;
  int shared_bytes;
};

template <Arithmetic A>
Plan make_plan(const Forward& f, const Device& device) {
  using M = Product<A>;
  using T = typename M::T;
  constexpr int channels = kStage / int{sizeof(T)};
  const Shape& s = f.shape;
  const auto box = [](int64_t n, int64_t d, int64_t h, int64_t w) {
    return Box{static_cast<int>(n), static_cast<int>(d), static_cast<int>(h), static_cast<int>(w)};
  };
  Plan plan{};
  Conv3& k = plan.kernel;
  const int64_t column_blocks = ceil_div(s.out, kMostGroups * kGroup);
  k.image = box(s.n, s.d, s.h, s.w);
  k.kernel = box(1, s.kd, s.kh, s.kw);
  k.in = static_cast<int>(s.in);
  k.output.bias = f.bias;
  k.groups = static_cast<int>(ceil_div(ceil_div(s.out, kGroup), column_blocks));
  const auto resident = [&](int bytes) {
    const int most = plan.large || k.groups == kMostGroups ? kResident<4, 2> : kResident<2, 2>;
    return std::min(most, (device.shared_per_block + 1024) / (bytes + 1024));
  };
  int64_t splits = 1;
  const int64_t fewest_splits = ceil_div(s.in * int64_t{sizeof(T)}, kMostSplit);
  for (int rows = kWarps * 16 * (fewest_splits > 1 ? 2 : M::kTiles); rows >= 1; rows /= 2) {
    k.box = choose_box(k.image, k.kernel, rows, k.groups * kGroup);
    k.halo = halo_of(k.box, k.kernel);
    k.tiles = boxes_in(k.image, k.box);
    const int64_t blocks = k.tiles.volume() * column_blocks;
    // Below 64 pixels boxes only shrink to fit shared memory.
    const bool enough = blocks >= device.multiprocessors || rows <= kWarps * 16;
    const int64_t most_splits = ceil_div(s.in, channels);
    splits = std::max(std::min(device.multiprocessors / blocks, most_splits), fewest_splits);
    k.split_channels = static_cast<int>(ceil_div(most_splits, splits) * channels);
    plan.large = rows > kWarps * 16 * 2;
    const int staging = static_cast<int>(k.groups == 1   ? WarpTile<1, 2>::staging_bytes<T>()
                                         : k.groups == 2 ? WarpTile<1, 4>::staging_bytes<T>()
                                                         : WarpTile<1, 6>::staging_bytes<T>());
    const auto bytes_with = [&](int weights) {
      k.stage_weights = weights;
      return Layout(k, plan.large ? 4 : 2, sizeof(T), M::kBytes, staging).bytes;
    };
    const int without = bytes_with(0);
    plan.shared_bytes = bytes_with(static_cast<int>(kStage / M::kBytes * s.taps() * k.groups * M::kFragments));
    if (device.capability < 80 || resident(plan.shared_bytes) < resident(without)) plan.shared_bytes = bytes_with(0);
    if (enough && plan.shared_bytes <= device.shared_per_block) break;
  }
  splits = ceil_div(s.in, k.split_channels);
  const int64_t at_once = int64_t{device.multiprocessors} * resident(plan.shared_bytes) / (column_blocks * splits);
  plan.grid = dim3(static_cast<unsigned>(std::min<int64_t>(k.tiles.volume(), std::max<int64_t>(1, at_once))),
                   static_cast<unsigned>(column_blocks), static_cast<unsigned>(splits));
  const int64_t tile_sums = k.tiles.volume() * column_blocks * kThreads * (plan.large ? 4 : 2) * 2 * k.groups;
  plan.shared = plan_forward(f, A, plan.grid, tile_sums, pack_fragments(f, k.groups, A), 0);
  return plan;
}

template <Arithmetic A, int MI>
auto kernel_of(int groups) {
  return groups == 1 ? conv3_kernel<A, MI, 2> : groups == 2 ? conv3_kernel<A, MI, 4> : conv3_kernel<A, MI, 6>;
}

template <Arithmetic A>
int run(const Forward& f, const Device& device, void* prepared, void* workspace, void* stream) {
  using T = typename Product<A>::T;
  Plan plan = make_plan<A>(f, device);
  const int64_t pixel = f.x.ld * int64_t{sizeof(T)};
  if (plan.shared_bytes > device.shared_per_block || std::max(f.shape.pixels(), pixel) > INT32_MAX) {
    return cudaErrorNotSupported;
  }
  Conv3& k = plan.kernel;
  k.x = static_cast<const unsigned char*>(f.x.data);
  k.pixel = static_cast<int>(pixel);
  k.access = access_of(f.x.data, f.shape.pixels() > 1 ? k.pixel : 0);
  k.norm = f.norm;
  k.slope = slope_of(f.norm);
  k.weights = static_cast<const unsigned char*>(prepared);
  k.output = make_output(f, sizeof(T), plan.shared, prepared, workspace);
  auto kernel = kernel_of<A, 2>(k.groups);
  if constexpr (Product<A>::kTiles > 2) {
    if (plan.large) kernel = kernel_of<A, Product<A>::kTiles>(k.groups);
  }
  return LAUNCH(kernel, plan.grid, dim3(kThreads), plan.shared_bytes, stream, k);
}

}  // namespace

Needs conv3_forward_needs(const Forward& f, Arithmetic arithmetic, const Device& device) {
  return with_arithmetic(arithmetic,
                         [&](auto kind) { return make_plan<decltype(kind)::value>(f, device).shared.needs(); });
}

int conv3_forward(const Forward& f, Arithmetic arithmetic, const Device& device, void* prepared, void* workspace,
                  void* stream) {
  if (f.shape.pixels() == 0) return 0;
  return with_arithmetic(arithmetic,
                         [&](auto kind) { return run<decltype(kind)::value>(f, device, prepared, workspace, stream); });
}

}  // namespace fused_densenet
