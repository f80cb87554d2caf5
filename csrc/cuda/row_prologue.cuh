// Norms, unit rows and the running statistics of norms on the device.
//
// Two kernels when statistics are wanted, else one. Doing all in one launch needs the last block
// to know that it is the last, hence a counter that something zeroes beforehand: one more launch,
// or state that outlives the call and breaks when two streams share it. The second kernel reads
// 12 bytes a row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "row_prologue.h"

namespace fastmargin::cuda {

constexpr int kUnitRowsThreads = 256;
constexpr int kNormStatsThreads = 512;

template <typename T, int kPack>
struct alignas(sizeof(T) * kPack > 16 ? 16 : sizeof(T) * kPack) Pack {
  T at[kPack];
};

template <typename In>
struct UnitRowsLaunch {
  UnitRowsArgs<In> rows;
  Compute<In>* unknown_mean;  // set to NaN if not null: there are no statistics
  Compute<In>* unknown_std;
};

// A warp per row, in two passes: the second finds the row in the cache. kPack > 1 needs contiguous
// rows, a multiple of kPack columns, and every row aligned to its pack. Left alone, ptxas aims at
// more than the four blocks asked for here, and spills.
template <typename In, int kPack>
__global__ void __launch_bounds__(kUnitRowsThreads, 4) unit_rows_kernel(UnitRowsLaunch<In> launch) {
  using T = Compute<In>;
  const UnitRowsArgs<In>& a = launch.rows;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarpSize;
  const auto load = [&a](int64_t row, int64_t d) {
    if constexpr (kPack > 1) {
      return *reinterpret_cast<const Pack<In, kPack>*>(a.x + row * a.row_stride + d);
    } else {
      return Pack<In, 1>{{a.x[row * a.row_stride + d * a.col_stride]}};
    }
  };
  for (int64_t row = thread / kWarpSize; row < a.rows; row += warps) {
    const bool ignored = is_ignored(a, row);
    T sum = 0;
    for (int64_t d = lane * kPack; d < a.cols; d += kWarpSize * kPack) {
      const Pack<In, kPack> x = ignored ? Pack<In, kPack>{} : load(row, d);
#pragma unroll
      for (int k = 0; k < kPack; ++k) sum += widen(x.at[k]) * widen(x.at[k]);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    const T norm = std::sqrt(sum);
    const T inverse = inverse_norm(norm);
    if (lane == 0) a.norm[row] = norm;
    for (int64_t d = lane * kPack; d < a.cols; d += kWarpSize * kPack) {
      const Pack<In, kPack> x = ignored ? Pack<In, kPack>{} : load(row, d);
      Pack<T, kPack> unit;
#pragma unroll
      for (int k = 0; k < kPack; ++k) unit.at[k] = widen(x.at[k]) * inverse;
      *reinterpret_cast<Pack<T, kPack>*>(a.x_hat + row * a.cols + d) = unit;
    }
  }
  if (thread == 0 && launch.unknown_mean != nullptr) {
    *launch.unknown_mean = *launch.unknown_std = static_cast<T>(NAN);
  }
}

// Lane 0 gets the moments of the whole warp, merged in an order that never changes.
template <typename T>
__device__ Moments<T> merge_warp(Moments<T> own) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    Moments<T> other;
    other.count = __shfl_down_sync(kAllLanes, static_cast<long long>(own.count), offset);
    other.mean = __shfl_down_sync(kAllLanes, own.mean, offset);
    other.m2 = __shfl_down_sync(kAllLanes, own.m2, offset);
    own = merge(own, other);
  }
  return own;
}

// One block: the statistics are three numbers, and their order of summation is fixed.
template <typename T>
__global__ void __launch_bounds__(kNormStatsThreads) norm_stats_kernel(NormStatsArgs<T> a) {
  constexpr int kWarps = kNormStatsThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize, "one warp merges what the warps found");
  __shared__ Moments<T> of_warp[kWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Moments<T> empty = {0, T(0), T(0)};

  Moments<T> own = empty;
  add_rows(own, a.norm, a.labels, threadIdx.x, a.rows, kNormStatsThreads, a.ema);
  own = merge_warp(own);
  if (lane == 0) of_warp[warp] = own;
  __syncthreads();
  if (warp == 0) {
    own = merge_warp(lane < kWarps ? of_warp[lane] : empty);
    if (lane == 0) write_stats(a, own);
  }
}

// Whether every row of x and of x_hat can be moved in packs.
template <typename In, int kPack>
bool packs(const UnitRowsArgs<In>& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return a.col_stride == 1 && a.row_stride % kPack == 0 && a.cols % kPack == 0 && aligned(a.x) &&
         aligned(a.x_hat);
}

// Unit rows and norms; with `unknown_*` not null these are set to NaN.
template <typename In>
cudaError_t unit_rows(const UnitRowsLaunch<In>& launch_args, cudaStream_t stream,
                      int64_t max_blocks = kMaxBlocks) {
  constexpr int kPack = 16 / sizeof(In);
  const int64_t blocks =
      blocks_for(launch_args.rows.rows, kUnitRowsThreads / kWarpSize, max_blocks);
  const auto kernel =
      packs<In, kPack>(launch_args.rows) ? unit_rows_kernel<In, kPack> : unit_rows_kernel<In, 1>;
  return launch(kernel, blocks, kUnitRowsThreads, stream, launch_args);
}

template <typename T>
cudaError_t norm_stats(const NormStatsArgs<T>& args, cudaStream_t stream) {
  return launch(norm_stats_kernel<T>, 1, kNormStatsThreads, stream, args);
}

}  // namespace fastmargin::cuda
