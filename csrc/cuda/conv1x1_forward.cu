// The 1x1 convolution: out[p, k] = sum over c of relu(norm(x[p, c])) w[k, c].
//
// A block multiplies a tile of pixels with all output channels (up to 256 of them), so that x is read once:
//   128 pixels x 128 channels, 2 x 2 warps: per 32 bytes of channels, 8 KiB of fragments come from shared memory for x
//   and 8 KiB for the weights, and 4 KiB of x pass through it to be normalised. A stage of 64 bytes of channels is 256
//   rows x 80 bytes = 20 KiB; with four stages and the vectors, statistics and staging of C = 1024 a block has 105 KiB.
//   Two fit a multiprocessor of sm_90 and keep 2 x 2 x 8 KiB of x in flight, which covers its memory's latency.
//   Up to 64 output channels: 4 x 1 warps, 256 pixels. Up to 192 or 256: three or four warps beside each other.
// Blocks are persistent: the copies for the next tile are under way while one is stored, and each leaves one row of
// moments. Layers with fewer such tiles than multiprocessors get tiles of a half or a quarter of the pixels. Where
// these leave more than a third of the multiprocessors idle, tiles are of 32 pixels and 64 channels, which read x again
// from the second-level cache, and if these do not suffice either, there are splits of the input channels.
//
// Weights are copied as they are where channels are side by side in the data's type. Else, as for float32 weights
// beside 16-bit data, one small kernel packs them first, instead of every block by single loads.
//
// Where it pools, a kernel of its own leaves the averaged activations, a quarter of x in 2D, and the convolution reads
// those: three layers of a network are not worth a second main loop.
#include "prepare.cuh"

namespace fused_densenet {
namespace {

constexpr int kMostColumns = 256, kFewColumns = 64, kPackThreads = 256, kColumnTiles = 8;

// W[out][in] with neighbouring channels side by side, rows some bytes apart.
struct Rows {
  const unsigned char* data;
  int64_t row;
  int access;
};

struct Conv1x1 {
  const unsigned char* x;
  int64_t pixel;  // bytes
  Norm norm;
  float slope;
  Rows weights;
  int64_t pixels;
  int in, split_channels, access;
  int groups, warps_beside;  // 16-channel groups of a block, and the warps that share them
  int stages;
  Output output;
};

// The dynamic shared memory of a block, in bytes from its beginning.
struct Layout {
  int vector_channels, columns, rows, parts;
  int vectors, statistics, staging, stages, stage;  // where each begins, and the size of a stage

  __host__ __device__ Layout(const Conv1x1& f, int threads, int tiles, int element, int staging_bytes) {
    const int warps = threads / 32;
    parts = warps / f.warps_beside;
    rows = parts * tiles * 16;
    columns = f.groups * kGroup;
    const int channels = kStage / element;
    vector_channels = (f.split_channels + channels - 1) / channels * channels;
    vectors = 0;
    statistics = NormVectors::kCount * vector_channels * int{sizeof(float)};
    staging = statistics + static_cast<int>(Statistics::bytes(columns, parts, f.output.bias));
    stages = staging + warps * staging_bytes;
    stage = (rows + columns) * kPitch;
  }
  int bytes(int count) const { return stages + count * stage; }
};

// Sizes of an image and of its pooling; 32-bit, because divisions of pixels are most of what the kernel does.
struct Pooling {
  int n, d, h, w, window_d, window_h, window_w, channels;
};

// The mean of the activation over each window: pooled[out pixel][chunks of channels]. Lanes take chunks, warps pixels.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pool_kernel(Pooling s, const T* x, int64_t ld, bool whole, Norm norm, float slope, T* pooled, int chunks) {
  const int d = s.d / s.window_d, h = s.h / s.window_h, w = s.w / s.window_w;
  const int out = static_cast<int>(blockIdx.x) * (kPackThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (out >= s.n * d * h * w) return;
  const int plane = out / (w * h), depth = plane / d * s.d + plane % d * s.window_d;
  const int first = (depth * s.h + out / w % h * s.window_h) * s.w + out % w * s.window_w;
  const float share = 1.0f / static_cast<float>(s.window_d * s.window_h * s.window_w);
  for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32) {
    const int channel = chunk * Chunk<T>::size, count = min(s.channels - channel, Chunk<T>::size);
    float sum[Chunk<T>::size] = {};
    ChannelNorm<T> own[Chunk<T>::size];
#pragma unroll
    for (int c = 0; c < Chunk<T>::size; ++c) own[c] = ChannelNorm<T>::of(norm, channel + (c < count ? c : 0));
    for (int i = 0; i < s.window_d * s.window_h; ++i) {
      for (int j = 0; j < s.window_w; ++j) {
        const int p = first + (i / s.window_h * s.h + i % s.window_h) * s.w + j;
        const T* from = x + p * ld + channel;
        Chunk<T> values;
        if (whole && count == Chunk<T>::size) {
          values = *reinterpret_cast<const Chunk<T>*>(from);
        } else {
#pragma unroll
          for (int c = 0; c < Chunk<T>::size; ++c) values.element[c] = c < count ? from[c] : rounded<T>(0.0f);
        }
#pragma unroll
        for (int c = 0; c < Chunk<T>::size; ++c) {
          sum[c] += leaky(normalised(as_float(values.element[c]), own[c].mean, own[c].scale, own[c].shift), slope);
        }
      }
    }
    Chunk<T> result;
#pragma unroll
    for (int c = 0; c < Chunk<T>::size; ++c) result.element[c] = rounded<T>(c < count ? sum[c] * share : 0.0f);
    reinterpret_cast<Chunk<T>*>(pooled)[int64_t{out} * chunks + chunk] = result;
  }
}

// Large tiles have no registers left for splits.
template <int MI>
constexpr bool kSplits = MI < 4;

// MI: tiles of 16 pixels in a warp. Of two, ptxas would otherwise spill for sm_75 to fit two blocks of 256 threads.
template <Arithmetic A, int MI>
__global__ void __launch_bounds__(256, MI == 2 ? 1 : 0) conv1x1_kernel(const Conv1x1 f) {
  using M = Product<A>;
  using T = typename M::T;
  constexpr int NT = kColumnTiles, element = sizeof(T), channels = kStage / element, per_chunk = Chunk<T>::size;
  using Tile = WarpTile<MI, NT>;
  DYN_SMEM(shared);
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31, warp = tid >> 5;
  const Layout layout(f, threads, MI, element, Tile::template staging_bytes<T>());
  const NormVectors vectors{{reinterpret_cast<float*>(shared), layout.vector_channels}};
  const Statistics statistics{reinterpret_cast<float*>(shared + layout.statistics), layout.columns, layout.parts};
  unsigned char* staging = shared + layout.staging + warp * static_cast<int>(Tile::template staging_bytes<T>());
  const auto stage_at = [&](int stage) { return shared + layout.stages + stage * layout.stage; };

  const int first_column = static_cast<int>(blockIdx.y) * layout.columns;
  const int first_channel = static_cast<int>(blockIdx.z) * f.split_channels;
  const int split_channels = min(f.split_channels, f.in - first_channel);
  const int beside = warp % f.warps_beside, part = warp / f.warps_beside;
  const int group = beside * f.groups / f.warps_beside, groups = (beside + 1) * f.groups / f.warps_beside - group;
  Tile tile;
  tile.local = group * kGroup;
  tile.first = first_column + tile.local;
  tile.columns = clamp(f.output.channels - tile.first, 0, groups * kGroup);

  vectors.load<T>(f.norm, first_channel, split_channels);
  const float* const bias = statistics.load_bias<T>(f.output, first_column);

  const int64_t tiles = (f.pixels + layout.rows - 1) / layout.rows;
  const int steps = (split_channels + channels - 1) / channels;
  const int64_t own_tiles = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
  const int chunk = tid % (kStage / kChunk), own_row = own_row_of(tid), row_step = threads / (kStage / kChunk);
  // Chunks of a stage beyond the last product are neither copied nor normalised.
  const int all_bytes = (split_channels * element + M::kBytes - 1) / M::kBytes * M::kBytes;
  int64_t loading_tile = blockIdx.x, tile_index = blockIdx.x;
  int loading = 0, preparing = 0, consuming = 0, count = 0;

  const auto own_of = [&](int count) { return (count - own_row + row_step - 1) / row_step; };
  const int own_pixels = own_of(layout.rows), own_columns = own_of(layout.columns);
  const auto in_stage = [&](int step, int rows) { return step * kStage + chunk * kChunk < all_bytes ? rows : 0; };

  const auto load = [&](int stage) {
    const int channel = loading * channels + chunk * per_chunk;
    const int valid = clamp((split_channels - channel) * element, 0, kChunk);
    const int64_t offset = int64_t{first_channel + channel} * element;
    unsigned char* to = stage_at(stage) + own_row * kPitch + chunk * kChunk;
    const int64_t pixel = loading_tile * layout.rows + own_row;
    copy_rows(to, row_step * kPitch, f.x + pixel * f.pixel + offset, row_step * f.pixel, in_stage(loading, own_pixels),
              clamp(f.pixels - pixel, 0, layout.rows), row_step, valid, f.access);
    const int column = first_column + own_row;
    copy_rows(to + layout.rows * kPitch, row_step * kPitch, f.weights.data + column * f.weights.row + offset,
              row_step * f.weights.row, in_stage(loading, own_columns),
              clamp(f.output.channels - column, 0, layout.columns), row_step, valid, f.weights.access);
    if (++loading == steps) {
      loading = 0;
      loading_tile += gridDim.x;
    }
  };

  const auto prepare = [&](int stage) {
    if (multiplied_as_it_is<A>(f.norm)) return;
    const Affine<A> affine(vectors, preparing * channels + chunk * per_chunk);
    with_activation(f.slope, [&](auto activation) {
      unsigned char* x = stage_at(stage) + own_row * kPitch + chunk * kChunk;
      for (int i = in_stage(preparing, own_pixels); i > 0; --i, x += row_step * kPitch) {
        store_shared(x, affine.activated(x, activation));
      }
    });
    preparing = preparing + 1 == steps ? 0 : preparing + 1;
  };

  int left_offset[M::kRows];
  for (int i = 0; i < M::kRows; ++i) {
    left_offset[i] = (part * MI * 16 + M::left_row(lane, i)) * kPitch + M::left_offset(lane);
  }
  const int right_offset = (layout.rows + tile.local) * kPitch + M::right_offset(lane, kPitch);

  const auto pixel = [&](int i, int row) {
    const int64_t p = tile_index * layout.rows + (part * MI + i) * 16 + row;
    return p < f.pixels ? p : -1;
  };

  const bool split = kSplits<MI> && f.output.partial != nullptr;
  const auto store_tile = [&] {
    tile.activate(f.output.slope);
    tile.template store<T>(f.output, staging, pixel);
    if (f.output.moments.data == nullptr) return;
    const int valid = clamp(f.pixels - tile_index * layout.rows, 0, layout.rows);
    tile.add_moments(statistics, part, count == 0, valid, pixel);
    count += valid;
  };
  const auto finish_tile = [&] {
    if (split) {
      tile.store_partial(f.output, tile_index);
    } else {
      store_tile();
    }
    tile.start(split ? nullptr : bias);
    tile_index += gridDim.x;
  };

  const auto multiply = [&](int stage, float (&sum)[MI][NT][4]) {
    const unsigned char* rows = stage_at(stage);
    const int bytes = min(kStage, (split_channels - consuming * channels) * element);
#pragma unroll
    for (int k = 0; k < kStage; k += M::kBytes) {
      if (k >= bytes) break;
      typename M::Left a[MI];
#pragma unroll
      for (int i = 0; i < MI; ++i) M::load(a[i], rows + i * 16 * kPitch + k, left_offset);
#pragma unroll
      for (int j = 0; j < NT / 2; ++j) {
        if (j >= groups) break;
        typename M::Right b;
        M::load(b, rows + right_offset + j * kGroup * kPitch + k, kPitch);
#pragma unroll
        for (int i = 0; i < MI; ++i) {
          M::multiply(sum[i][2 * j], a[i], b, 0);
          M::multiply(sum[i][2 * j + 1], a[i], b, 1);
        }
      }
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
    if (++consuming == steps) {
      consuming = 0;
      finish_tile();
    }
  };

  __syncthreads();
  tile.start(split ? nullptr : bias);
  pipeline(own_tiles * steps, f.stages, load, prepare, consume);
  if (split) {
    if (!adds_splits(f.output, reinterpret_cast<unsigned*>(statistics.part(0, 0)))) return;
    for (tile_index = blockIdx.x; tile_index < tiles; tile_index += gridDim.x) {
      __syncthreads();  // the statistics of the tile before have been read
      tile.start(bias);
      tile.add_partials(f.output, tile_index);
      store_tile();
    }
  }
  if (f.output.moments.data != nullptr) {
    store_statistics(statistics, f.output.moments, static_cast<int>(blockIdx.x), first_column, count);
  }
}

struct Plan {
  Conv1x1 kernel;
  ForwardPlan shared;
  int tiles;  // of 16 pixels in a warp
  dim3 grid;
  int threads, shared_bytes;
};

// Bytes, in whole chunks.
template <class T>
int64_t packed_row(const Shape& s) {
  return ceil_div(s.in * sizeof(T), kChunk) * kChunk;
}

template <class T>
Rows weights_of(const Forward& f, const Plan& plan, const void* prepared) {
  if (plan.shared.packing.numbers > 0)
    return {static_cast<const unsigned char*>(prepared), packed_row<T>(f.shape), kChunk};
  const int64_t row = f.weight.stride_out * int64_t{sizeof(T)};
  return {static_cast<const unsigned char*>(f.weight.data), row, access_of(f.weight.data, f.shape.out > 1 ? row : 0)};
}

template <class T>
int pool(const Forward& f, void* pooled, void* stream) {
  const Shape& s = f.shape;
  if (s.pixels() > INT32_MAX) return cudaErrorNotSupported;
  const auto number = [](int64_t x) { return static_cast<int>(x); };
  const Pooling pooling{number(s.n),        number(s.d),        number(s.h),        number(s.w),
                        number(s.window_d), number(s.window_h), number(s.window_w), number(s.in)};
  const dim3 blocks(static_cast<unsigned>(ceil_div(s.out_pixels(), kPackThreads / 32)));
  return LAUNCH(pool_kernel<T>, blocks, dim3(kPackThreads), 0, stream, pooling, static_cast<const T*>(f.x.data), f.x.ld,
                access_of(f.x.data, f.x.ld * int64_t{sizeof(T)}) == kChunk, f.norm, slope_of(f.norm),
                static_cast<T*>(pooled), number(packed_row<T>(s) / kChunk));
}

template <Arithmetic A>
Plan make_plan(const Forward& f, const Device& device) {
  using T = typename Product<A>::T;
  constexpr int large = Product<A>::kTiles;
  constexpr int channels = kStage / int{sizeof(T)};
  const Shape& s = f.shape;
  const int64_t pixels = s.out_pixels();
  Plan plan;
  Conv1x1& k = plan.kernel;
  k.in = static_cast<int>(s.in);
  k.output.bias = f.bias;
  int64_t column_blocks;
  int warps_above;
  const auto take_columns = [&](int64_t most, int groups_of_warp) {
    column_blocks = ceil_div(s.out, most);
    k.groups = static_cast<int>(ceil_div(ceil_div(s.out, column_blocks), kGroup));
    k.warps_beside = static_cast<int>(ceil_div(k.groups, groups_of_warp));
    warps_above = k.warps_beside == 1 ? 4 : 2;
  };
  const auto tiles = [&](int tile) { return ceil_div(pixels, warps_above * tile * 16); };
  const auto take_splits = [&](int64_t splits) {
    k.split_channels = static_cast<int>(ceil_div(ceil_div(s.in, splits), channels) * channels);
    plan.threads = 32 * k.warps_beside * warps_above;
    return Layout(k, plan.threads, plan.tiles, sizeof(T),
                  static_cast<int>(WarpTile<1, kColumnTiles>::staging_bytes<T>()));
  };
  const int64_t fewest_splits = ceil_div(s.in * int64_t{sizeof(T)}, kMostSplit);
  take_columns(kMostColumns, 4);
  plan.tiles = large;
  const auto too_few = [&] { return tiles(plan.tiles) * column_blocks < device.multiprocessors; };
  while (plan.tiles > 1 && (too_few() || (plan.tiles >= 4 && fewest_splits > 1))) {
    plan.tiles = sizeof(T) == 2 ? plan.tiles / 2 : 1;
  }
  const bool small = 3 * tiles(plan.tiles) * column_blocks < 2 * device.multiprocessors ||
                     take_splits(fewest_splits).bytes(2) > device.shared_per_block;
  if (small) {
    plan.tiles = 1;
    take_columns(kFewColumns, 2);
  }
  const int64_t blocks = tiles(plan.tiles);
  int64_t splits = small ? device.multiprocessors / (blocks * column_blocks) : 1;
  splits = std::max(std::min(splits, ceil_div(s.in, 64)), fewest_splits);
  const Layout layout = take_splits(splits);
  splits = ceil_div(s.in, k.split_channels);
  // As many stages as let two blocks share a multiprocessor, at least two.
  const int half = (device.shared_per_block + 1024) / 2 - 1024;
  k.stages = kMostStages;
  while (k.stages > 2 && layout.bytes(k.stages) > half) --k.stages;
  if (layout.bytes(k.stages) > half) {
    k.stages = kMostStages;
    while (k.stages > 2 && layout.bytes(k.stages) > device.shared_per_block) --k.stages;
  }
  plan.shared_bytes = layout.bytes(k.stages);
  const int resident = std::max(1, (device.shared_per_block + 1024) / (plan.shared_bytes + 1024));
  const int threads = plan.tiles == 1 ? 512 : 256;  // that registers are enough for
  const int64_t at_once = int64_t{device.multiprocessors} * std::min(resident, std::max(1, threads / plan.threads));
  plan.grid = dim3(static_cast<unsigned>(std::min(blocks, std::max<int64_t>(1, at_once / (column_blocks * splits)))),
                   static_cast<unsigned>(column_blocks), static_cast<unsigned>(splits));
  const bool same_type = sizeof(T) == 4 || !f.weight.is_float;
  const bool whole_words = s.out == 1 || f.weight.stride_out * sizeof(T) % 4 == 0;
  const bool pack = !same_type || (f.weight.stride_in != 1 && s.in > 1) || !whole_words;
  const size_t pooled_bytes = s.window() > 1 ? pixels * packed_row<T>(s) : 0;
  const int64_t tile_sums = blocks * column_blocks * plan.threads * plan.tiles * kColumnTiles;
  plan.shared = plan_forward(f, A, plan.grid, tile_sums, pack ? pack_rows(f, A) : Packing{}, pooled_bytes);
  return plan;
}

template <Arithmetic A>
int run(const Forward& f, const Device& device, void* prepared, void* workspace, void* stream) {
  using T = typename Product<A>::T;
  Plan plan = make_plan<A>(f, device);
  Conv1x1& k = plan.kernel;
  k.x = static_cast<const unsigned char*>(f.x.data);
  k.pixel = f.x.ld * int64_t{sizeof(T)};
  k.norm = f.norm;
  k.pixels = f.shape.out_pixels();
  if (f.shape.window() > 1) {
    const int error = pool<T>(f, workspace, stream);
    if (error != 0) return error;
    k.x = static_cast<const unsigned char*>(workspace);
    k.pixel = packed_row<T>(f.shape);
    k.norm = {};
  }
  k.slope = slope_of(k.norm);
  k.access = access_of(k.x, k.pixels > 1 ? k.pixel : 0);
  k.output = make_output(f, sizeof(T), plan.shared, prepared, workspace);
  k.weights = weights_of<T>(f, plan, prepared);
  auto kernel = plan.tiles == 1 ? conv1x1_kernel<A, 1> : conv1x1_kernel<A, Product<A>::kTiles>;
  if constexpr (sizeof(T) == 2) {
    if (plan.tiles == 2) kernel = conv1x1_kernel<A, 2>;
  }
  return LAUNCH(kernel, plan.grid, dim3(plan.threads), plan.shared_bytes, stream, k);
}

}  // namespace

Needs conv1x1_forward_needs(const Forward& f, Arithmetic arithmetic, const Device& device) {
  return with_arithmetic(arithmetic,
                         [&](auto kind) { return make_plan<decltype(kind)::value>(f, device).shared.needs(); });
}

int conv1x1_forward(const Forward& f, Arithmetic arithmetic, const Device& device, void* prepared, void* workspace,
                    void* stream) {
  if (f.shape.out_pixels() == 0) return 0;
  return with_arithmetic(arithmetic,
                         [&](auto kind) { return run<decltype(kind)::value>(f, device, prepared, workspace, stream); });
}

}  // namespace fused_densenet
