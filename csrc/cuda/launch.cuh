// How the kernels here are launched: one grid dimension, one struct as the argument.
//
// Through cudaLaunchKernelEx, not <<<>>>, so that the source is plain C++ and the tests can run it
// on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastmargin::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Kernels stride over the grid, so any number of blocks gives the same result.
constexpr int64_t kMaxBlocks = 65536;

inline int64_t blocks_for(int64_t items, int64_t items_per_block, int64_t max_blocks) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  return blocks < 1 ? 1 : (blocks < max_blocks ? blocks : max_blocks);
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, cudaStream_t stream,
                   const Args& args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace fastmargin::cuda
