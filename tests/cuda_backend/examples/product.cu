// c = a b for 16 x K by K x 8 numbers, by one warp: every instruction of ptx.cuh that kernels are made of.
#include "ptx.cuh"

namespace fused_densenet {
namespace {

constexpr int kPad = 8;  // numbers, so that rows of ldmatrix lie in different banks

template <class T>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) mma_bf16(d, a, b);
  if constexpr (std::is_same_v<T, __half>) mma_f16(d, a, b);
}

// a by rows, b by rows (16 numbers of which 8 are used): 16-bit numbers, copied in two stages.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* c, int depth) {
  DYN_SMEM(memory);
  constexpr int ld = 16 + kPad;
  T* stages = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x;
  const auto stage = [&](int k) { return stages + k / 16 % 2 * 32 * ld; };
  const auto copy = [&](int k) {
    const int row = lane / 2, column = lane % 2 * 8;
    cp_async<16>(stage(k) + row * ld + column, a + row * depth + k + column);
    cp_async<16>(stage(k) + (16 + row) * ld + column, b + (k + row) * 16 + column, column == 0);
    cp_async_commit();
  };
  float d[4] = {};
  copy(0);
  for (int k = 0; k < depth; k += 16) {
    if (k + 16 < depth) {
      copy(k + 16);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    uint32_t x[4], y[4];
    ldmatrix_x4(x, shared_address(stage(k) + lane % 16 * ld + lane / 16 * 8));
    ldmatrix_x4_trans(y, shared_address(stage(k) + (16 + lane % 16) * ld + lane / 16 * 8));
    const uint32_t left[2] = {y[0], y[1]};
    multiply<T>(d, x, left);
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// The same for float by TF32; b by columns. ldmatrix moves a float as two 16-bit numbers.
__global__ void product_tf32_kernel(const float* a, const float* b, float* c, int depth) {
  __shared__ float stage[24][8 + 4];
  const int lane = threadIdx.x;
  float d[4] = {};
  for (int k = 0; k < depth; k += 8) {
    for (int i = lane; i < 24 * 2; i += 32) {
      const int row = i / 2, column = i % 2 * 4;
      const float* from = row < 16 ? a + row * depth : b + (row - 16) * depth;
      cp_async<16>(&stage[row][column], from + k + column);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t x[4], y[4];
    ldmatrix_x4(x, shared_address(&stage[lane % 16][lane / 16 * 4]));
    ldmatrix_x4(y, shared_address(&stage[16 + lane % 8][lane / 8 % 2 * 4]));
    for (uint32_t& v : x) v = to_tf32(__uint_as_float(v));
    const uint32_t right[2] = {to_tf32(__uint_as_float(y[0])), to_tf32(__uint_as_float(y[1]))};
    mma_tf32(d, x, right);
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

}  // namespace

extern "C" int example_product(int type, const void* a, const void* b, float* c, int depth) {
  constexpr size_t shared = 2 * 32 * (16 + kPad) * 2;
  const dim3 grid(1), block(32);
  if (type == 0) {
    return LAUNCH(product_kernel<__nv_bfloat16>, grid, block, shared, nullptr, static_cast<const __nv_bfloat16*>(a),
                  static_cast<const __nv_bfloat16*>(b), c, depth);
  }
  if (type == 1) {
    return LAUNCH(product_kernel<__half>, grid, block, shared, nullptr, static_cast<const __half*>(a),
                  static_cast<const __half*>(b), c, depth);
  }
  return LAUNCH(product_tf32_kernel, grid, block, 0, nullptr, static_cast<const float*>(a),
                static_cast<const float*>(b), c, depth);
}

}  // namespace fused_densenet
