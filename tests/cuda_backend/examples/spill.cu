// More numbers alive at once than the registers that the launch bounds leave: what the tests must find.
namespace fused_densenet {

__global__ void __launch_bounds__(1024, 2) spill_kernel(const float* x, float* y, int n) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) {
#pragma unroll
    for (int j = 0; j < 64; ++j) kept[i] = fmaf(kept[i], kept[j], kept[i]);
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * n + threadIdx.x] = kept[i];
}

}  // namespace fused_densenet
