// Loss, derivatives and margin of every row in one launch; the arithmetic is csrc/margin_rows.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "margin_rows.h"

namespace fastmargin::cuda {

// Small blocks, so that a thousand rows still reach many multiprocessors.
constexpr int kMarginRowsThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kMarginRowsThreads) margin_rows_kernel(MarginRowsArgs<T> args) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = first; row < args.rows; row += step) write_margin_row(args, row);
}

template <typename T>
cudaError_t margin_rows(const MarginRowsArgs<T>& args, cudaStream_t stream,
                        int64_t max_blocks = kMaxBlocks) {
  if (args.rows == 0) return cudaSuccess;
  const int64_t blocks = blocks_for(args.rows, kMarginRowsThreads, max_blocks);
  return launch(margin_rows_kernel<T>, blocks, kMarginRowsThreads, stream, args);
}

}  // namespace fastmargin::cuda
