// The convolution over neighbouring pixels, 3 x 3 above all: out[p, k] = sum over taps and c of a[p + tap, c] w[k, c,
// tap] with a = relu(norm(x)) inside the image and zero outside it.
//
// A tile is a box of pixels of some images. Of 64 bytes of channels at a time the box and its halo are copied into
// shared memory, normalised and rectified there once, and multiplied with every tap: a tap is an offset of the rows
// that ldmatrix reads. The next channels, or the next box's first, are under way meanwhile. For 16 x 16 pixels a stage
// is 18 x 18 rows x 80 bytes = 25 KiB, 1.27 of the image; two stages and the rest are 57 KiB, so that several blocks
// fit a multiprocessor. It is bound by tensor cores and by the fragments they need: with k = 32, a warp's 64 pixels x
// 32 channels take 4 reads of 512 bytes from shared memory for 16 instructions.
//
// Weights do not pass through shared memory. One kernel packs them in the order of fragments, so that a warp reads each
// fragment with one instruction, one step ahead. They stay in the first-level cache beside the stages (72 KiB for 128
// channels in and 32 out, 3 x 3, 16 bits), which the copies of x bypass: shared memory is left to x, and no kernel
// size is too large. Packing is necessary anyway, because a contiguous weight has its channels nine elements apart.
//
// Layers with too few boxes get smaller ones, and if these do not suffice either, splits of the input channels whose
// sums are added in a fixed order afterwards.
#include "boxes.cuh"
#include "forward.cuh"

namespace fused_densenet {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kStages = 2, kTables = kStages + 1;
constexpr int kGroup = 16, kMostGroups = 3, kPackThreads = 256;
struct Conv3 {
  const unsigned char* x;
  int64_t pixel;  // bytes
  Norm norm;
  const unsigned char* weights;
  Box image, kernel, box, halo, tiles;  // tiles: boxes in each direction
  int in, split_channels, access, groups;
  Output output;
};

// The dynamic shared memory of a block, in bytes from its beginning.
struct Layout {
  int vector_channels, columns, halo, rows, taps;
  int statistics, staging, tables, rows_at, taps_at, stages, stage, bytes;

  __host__ __device__ Layout(const Conv3& f, int tiles, int element, int staging_bytes) {
    const int channels = kStage / element;
    vector_channels = (f.split_channels + channels - 1) / channels * channels;
    columns = f.groups * kGroup;
    halo = f.halo.volume();
    rows = kWarps * tiles * 16;
    taps = f.kernel.volume();
    statistics = Vectors::kCount * vector_channels * int{sizeof(float)};
    staging = statistics + static_cast<int>(Statistics::bytes(columns, kWarps));
    tables = staging + kWarps * staging_bytes;
    rows_at = tables + kTables * halo * int{sizeof(int)};
    taps_at = rows_at + rows * int{sizeof(int)};
    stages = (taps_at + taps * int{sizeof(int)} + 127) / 128 * 128;
    stage = halo * kPitch;
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

// MI: tiles of 16 pixels in a warp.
template <Arithmetic A, int MI>
__global__ void __launch_bounds__(kThreads) conv3_kernel(const Conv3 f) {
  using M = Product<A>;
  using T = typename M::T;
  constexpr int NT = 2 * kMostGroups, element = sizeof(T), channels = kStage / element, per_chunk = Chunk<T>::size;
  using Tile = WarpTile<MI, NT>;
  DYN_SMEM(shared);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const Layout layout(f, MI, element, Tile::template staging_bytes<T>());
  const Vectors vectors{reinterpret_cast<float*>(shared), layout.vector_channels};
  const Statistics statistics{reinterpret_cast<float*>(shared + layout.statistics), layout.columns, kWarps};
  unsigned char* staging = shared + layout.staging + warp * static_cast<int>(Tile::template staging_bytes<T>());
  int* row_places = reinterpret_cast<int*>(shared + layout.rows_at);
  int* tap_offsets = reinterpret_cast<int*>(shared + layout.taps_at);
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
  tile.clear();

  vectors.load(f.norm, first_channel, split_channels);
  for (int i = tid; i < layout.rows; i += kThreads) {
    row_places[i] = i < own_places ? index_in(f.halo, place_in(f.box, i)) : kOutside;
  }
  for (int i = tid; i < taps; i += kThreads) tap_offsets[i] = index_in(f.halo, place_in(f.kernel, i)) * kPitch;
  fill_table(f, blockIdx.x, table(0), layout.halo);
  __syncthreads();

  const int centre = index_in(f.halo, {0, f.kernel.d / 2, f.kernel.h / 2, f.kernel.w / 2});
  const int chunk = tid % (kStage / kChunk), own_row = tid / (kStage / kChunk);
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

  const auto load = [&](int stage) {
    const int channel = loading.step * channels + chunk * per_chunk;
    const int valid = clamp((split_channels - channel) * element, 0, kChunk);
    const unsigned char* x = f.x + int64_t{first_channel + channel} * element;
    const int* pixels = table(loading.table);
    unsigned char* to = stage_at(stage) + chunk * kChunk;
    const int end = places_of(loading.step);
    for (int place = own_row; place < end; place += row_step) {
      const int p = pixels[place];
      const bool copied = p >= 0 && valid > 0;
      copy_chunk(to + place * kPitch, copied ? x + p * f.pixel : f.x, copied ? valid : 0, f.access);
    }
    if (loading.advance(steps)) {
      loading_tile += grid;
      if (loading_tile < tiles) fill_table(f, loading_tile, table(loading.table), layout.halo);
    }
  };

  const auto prepare = [&](int stage) {
    const Affine<A> affine(vectors, preparing.step * channels + chunk * per_chunk);
    const int* pixels = table(preparing.table);
    unsigned char* x = stage_at(stage) + chunk * kChunk;
    const int end = places_of(preparing.step);
    for (int place = own_row; place < end; place += row_step) {
      if (pixels[place] >= 0) affine.activate(x + place * kPitch);
    }
    preparing.advance(steps);
  };

  const auto pixel = [&](int i, int row) -> int64_t {
    const int place = row_places[(i * kWarps + warp) * 16 + row];
    return place < 0 ? place : table(consuming.table)[place + centre];
  };

  const auto finish_tile = [&] {
    if (f.output.partial != nullptr) {
      tile.store_partial(f.output, static_cast<int>(blockIdx.z), pixel);
    } else {
      tile.template store<T>(f.output, staging, pixel);
      if (f.output.moments.data != nullptr) {
        const int valid = pixels_of(f, consuming_tile);
        tile.add_moments(statistics, warp, count == 0, valid, pixel);
        count += valid;
      }
    }
    tile.clear();
    consuming_tile += grid;
  };

  // Weights lie as [block of columns][M::kBytes of channels][tap][group of columns].
  const int all_multiplications = (f.in * element + M::kBytes - 1) / M::kBytes;
  const int groups = f.groups, weight_step = groups * M::kFragments;
  const unsigned char* const all_weights =
      f.weights +
      (int64_t{blockIdx.y} * all_multiplications + first_channel * element / M::kBytes) * taps * weight_step;
  const auto load_weights = [&](typename M::Right(&b)[kMostGroups], const unsigned char* from) {
#pragma unroll
    for (int j = 0; j < kMostGroups; ++j) {
      if (j < groups) M::load_packed(b[j], from + j * M::kFragments, lane);
    }
  };

  const auto consume = [&](int stage) {
    const int bytes = min(kStage, (split_channels - consuming.step * channels) * element);
    const unsigned char* rows = stage_at(stage);
    const unsigned char* weights = all_weights + int64_t{consuming.step} * (kStage / M::kBytes) * taps * weight_step;
    int remaining = (bytes + M::kBytes - 1) / M::kBytes * taps, tap = 0;
    typename M::Right b[kMostGroups], next[kMostGroups];
    load_weights(b, weights);
    while (remaining > 0) {
      const unsigned char* at = rows + tap_offsets[tap];
      weights += weight_step;
      if (--remaining > 0) load_weights(next, weights);
      typename M::Left a[MI];
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        if (i < own_tiles) M::load(a[i], at, left_offset[i]);
      }
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        if (i >= own_tiles) break;
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          if (8 * j < tile.columns) M::multiply(tile.sum[i][j], a[i], b[j / 2], j % 2);
        }
      }
#pragma unroll
      for (int j = 0; j < kMostGroups; ++j) b[j] = next[j];
      if (++tap == taps) {
        tap = 0;
        rows += M::kBytes;
      }
    }
    if (consuming.step + 1 == steps) finish_tile();
    consuming.advance(steps);
  };

  pipeline(all_steps, kStages, load, prepare, consume);
  if (f.output.moments.data != nullptr && f.output.partial == nullptr) {
    store_statistics(statistics, f.output.moments, blockIdx.x, tile.first, count);
  }
}

// Weights in the order of fragments, zero where there is no channel; rounded to what is multiplied.
template <Arithmetic A, class W>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(Shape s, Weight weight, int groups, int64_t count, typename Product<A>::T* packed) {
  using M = Product<A>;
  constexpr int each = M::kFragments / int{sizeof(typename M::T)}, channels = M::kBytes / int{sizeof(typename M::T)};
  const int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (i >= count) return;
  int64_t at = i / each;
  const int2 place = M::packed_place(static_cast<int>(i % each));
  const int64_t group = at % groups, taps = s.kd * s.kh * s.kw, tap = (at /= groups) % taps;
  const int64_t steps = (s.in + channels - 1) / channels, step = (at /= taps) % steps, block = at / steps;
  const int64_t out = (block * groups + group) * kGroup + place.x, in = step * channels + place.y;
  float value = 0;
  if (out < s.out && in < s.in) {
    const int64_t offset = out * weight.stride_out + in * weight.stride_in +
                           tap / (s.kh * s.kw) * weight.stride_tap[0] + tap / s.kw % s.kh * weight.stride_tap[1] +
                           tap % s.kw * weight.stride_tap[2];
    value = as_float(static_cast<const W*>(weight.data)[offset]);
  }
  packed[i] = M::number(value);
}

struct Plan {
  Conv3 kernel;
  ForwardPlan shared;
  bool large;
  dim3 grid;
  int shared_bytes;
};

template <Arithmetic A>
constexpr int large_tiles() {
  return A == Arithmetic::f32 ? 2 : 4;  // two sets of weight fragments take 96 registers there
}

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
  k.groups = static_cast<int>(ceil_div(ceil_div(s.out, kGroup), column_blocks));
  int64_t splits = 1;
  for (int rows = kWarps * 16 * large_tiles<A>(); rows >= 8; rows /= 2) {
    k.box = choose_box(k.image, k.kernel, rows, k.groups * kGroup);
    k.halo = halo_of(k.box, k.kernel);
    k.tiles = boxes_in(k.image, k.box);
    const int64_t blocks = k.tiles.volume() * column_blocks;
    // Below 64 pixels boxes only shrink to fit shared memory.
    const bool enough = blocks >= device.multiprocessors || rows <= kWarps * 16;
    const int64_t most_splits = ceil_div(s.in, channels),
                  fewest_splits = ceil_div(s.in * int64_t{sizeof(T)}, kMostSplit);
    splits = std::max(std::min(device.multiprocessors / blocks, most_splits), fewest_splits);
    k.split_channels = static_cast<int>(ceil_div(most_splits, splits) * channels);
    plan.large = rows > kWarps * 16 * 2;
    constexpr int staging = static_cast<int>(WarpTile<1, 2 * kMostGroups>::staging_bytes<T>());
    plan.shared_bytes = Layout(k, plan.large ? 4 : 2, sizeof(T), staging).bytes;
    if (enough && plan.shared_bytes <= device.shared_per_block) break;
  }
  splits = ceil_div(s.in, k.split_channels);
  const int64_t resident = std::max(1, (device.shared_per_block + 1024) / (plan.shared_bytes + 1024));
  const int64_t at_once = device.multiprocessors * std::min<int64_t>(resident, 3) / (column_blocks * splits);
  plan.grid = dim3(static_cast<unsigned>(std::min<int64_t>(k.tiles.volume(), std::max<int64_t>(1, at_once))),
                   static_cast<unsigned>(column_blocks), static_cast<unsigned>(splits));
  const int64_t multiplications = ceil_div(s.in * sizeof(T), M::kBytes);
  plan.shared =
      plan_forward(f, splits, plan.grid.x, column_blocks * multiplications * s.taps() * k.groups * M::kFragments);
  return plan;
}

template <Arithmetic A>
int run(const Forward& f, const Device& device, void* workspace, void* stream) {
  using T = typename Product<A>::T;
  Plan plan = make_plan<A>(f, device);
  if (plan.shared_bytes > device.shared_per_block || f.shape.pixels() > INT32_MAX) return cudaErrorNotSupported;
  Conv3& k = plan.kernel;
  k.x = static_cast<const unsigned char*>(f.x.data);
  k.pixel = f.x.ld * int64_t{sizeof(T)};
  k.access = access_of(f.x.data, f.shape.pixels() > 1 ? k.pixel : 0);
  k.norm = f.norm;
  k.weights = static_cast<const unsigned char*>(workspace);
  k.output = make_output(f, sizeof(T), plan.shared, workspace);
  const int64_t count = static_cast<int64_t>(plan.shared.weights_bytes / sizeof(T));
  int error = LAUNCH(f.weight.is_float ? pack_kernel<A, float> : pack_kernel<A, T>,
                     dim3(static_cast<unsigned>(ceil_div(count, kPackThreads))), dim3(kPackThreads), 0, stream, f.shape,
                     f.weight, k.groups, count, static_cast<T*>(workspace));
  if (error != 0) return error;
  error = LAUNCH(plan.large ? conv3_kernel<A, large_tiles<A>()> : conv3_kernel<A, 2>, plan.grid, dim3(kThreads),
                 plan.shared_bytes, stream, k);
  return error != 0 ? error : finish_forward(f, A, plan.shared, k.output, stream);
}

}  // namespace

size_t conv3_forward_workspace(const Forward& f, Arithmetic arithmetic, const Device& device) {
  switch (arithmetic) {
    case Arithmetic::bf16:
      return make_plan<Arithmetic::bf16>(f, device).shared.bytes();
    case Arithmetic::f16:
      return make_plan<Arithmetic::f16>(f, device).shared.bytes();
    case Arithmetic::tf32:
      return make_plan<Arithmetic::tf32>(f, device).shared.bytes();
    default:
      return make_plan<Arithmetic::f32>(f, device).shared.bytes();
  }
}

int conv3_forward(const Forward& f, Arithmetic arithmetic, const Device& device, void* workspace, void* stream) {
  if (f.shape.pixels() == 0) return 0;
  switch (arithmetic) {
    case Arithmetic::bf16:
      return run<Arithmetic::bf16>(f, device, workspace, stream);
    case Arithmetic::f16:
      return run<Arithmetic::f16>(f, device, workspace, stream);
    case Arithmetic::tf32:
      return run<Arithmetic::tf32>(f, device, workspace, stream);
    default:
      return run<Arithmetic::f32>(f, device, workspace, stream);
  }
}

}  // namespace fused_densenet
