// Norms, unit rows and the running statistics of norms, for host and device.
//
// The specification is fastmargin/backends/reference.py (row_prologue, inverse_norm).
#pragma once

#include <cmath>
#include <cstdint>

#include "numeric.h"

namespace fastmargin {

// Rows at or below this norm have no direction: their unit row is zero.
constexpr double kNormFloor = 1e-12;

template <typename T>
FM_HOST_DEVICE T inverse_norm(T norm) {
  return norm > static_cast<T>(kNormFloor) ? T(1) / norm : T(0);
}

// Count, mean and sum of squared deviations of a set of numbers. Merged in a fixed order the
// result is the same in every run, whatever the number of threads.
template <typename T>
struct Moments {
  int64_t count;
  T mean, m2;
};

template <typename T>
FM_HOST_DEVICE void add_value(Moments<T>& moments, T value) {
  moments.count += 1;
  const T delta = value - moments.mean;
  moments.mean += delta / static_cast<T>(moments.count);
  moments.m2 += delta * (value - moments.mean);
}

template <typename T>
FM_HOST_DEVICE Moments<T> merge(const Moments<T>& a, const Moments<T>& b) {
  const int64_t count = a.count + b.count;
  if (count == 0) return a;
  const T delta = b.mean - a.mean;
  const T share = static_cast<T>(b.count) / static_cast<T>(count);
  return {count, a.mean + delta * share,
          a.m2 + b.m2 + delta * delta * static_cast<T>(a.count) * share};
}

// fastmargin.spec.NormEma without its tensors.
template <typename T>
struct EmaParams {
  T alpha, low, high;
};

// torch.lerp: exact at both ends.
template <typename T>
FM_HOST_DEVICE T lerp(T from, T to, T weight) {
  return weight < T(0.5) ? from + weight * (to - from) : to - (to - from) * (T(1) - weight);
}

// The mean needs one row and the unbiased standard deviation two; else the old value stays.
template <typename T>
FM_HOST_DEVICE T next_mean(const Moments<T>& batch, T old, T alpha) {
  return batch.count >= 1 ? lerp(old, batch.mean, alpha) : old;
}

template <typename T>
FM_HOST_DEVICE T next_std(const Moments<T>& batch, T old, T alpha) {
  if (batch.count < 2) return old;
  return lerp(old, std::sqrt(batch.m2 / static_cast<T>(batch.count - 1)), alpha);
}

// Adds the rows [begin, end) with a label to the moments of their clipped norms. A norm of NaN is
// left out: it would stay in the running statistics for good.
template <typename T>
FM_HOST_DEVICE void add_rows(Moments<T>& moments, const T* norm, const int64_t* labels,
                             int64_t begin, int64_t end, int64_t step, const EmaParams<T>& ema) {
  for (int64_t i = begin; i < end; i += step) {
    if (labels[i] >= 0 && norm[i] == norm[i]) add_value(moments, clamp(norm[i], ema.low, ema.high));
  }
}

// Input (rows, cols) of any strides; outputs contiguous.
template <typename In>
struct UnitRowsArgs {
  const In* x;
  const int64_t* labels;  // (rows,), or null
  int64_t rows, cols, row_stride, col_stride;
  Compute<In>* x_hat;  // (rows, cols)
  Compute<In>* norm;   // (rows,)
};

// A row without a label may hold anything: it is not read, and comes out as zeros.
template <typename In>
FM_HOST_DEVICE bool is_ignored(const UnitRowsArgs<In>& a, int64_t row) {
  return a.labels != nullptr && a.labels[row] < 0;
}

// T is the compute type. Old and new statistics are (1,); the old ones may be the new ones.
template <typename T>
struct NormStatsArgs {
  const T* norm;
  const int64_t* labels;
  int64_t rows;
  EmaParams<T> ema;
  const T* old_mean;
  const T* old_std;
  T* new_mean;
  T* new_std;
};

template <typename T>
FM_HOST_DEVICE void write_stats(const NormStatsArgs<T>& a, const Moments<T>& batch) {
  *a.new_mean = next_mean(batch, *a.old_mean, a.ema.alpha);
  *a.new_std = next_std(batch, *a.old_std, a.ema.alpha);
}

// ---- host loops ---------------------------------------------------------------------------------

// One row on the CPU. Sixteen running sums let the compiler use vectors without reordering.
template <typename In>
void write_unit_row(const UnitRowsArgs<In>& a, int64_t row) {
  using T = Compute<In>;
  constexpr int64_t kSums = 16;
  const In* x = a.x + row * a.row_stride;
  T* out = a.x_hat + row * a.cols;
  if (is_ignored(a, row)) {
    for (int64_t d = 0; d < a.cols; ++d) out[d] = T(0);
    a.norm[row] = T(0);
    return;
  }
  for (int64_t d = 0; d < a.cols; ++d) out[d] = widen(x[d * a.col_stride]);
  T sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= a.cols; d += kSums) {
    for (int64_t k = 0; k < kSums; ++k) sums[k] += out[d + k] * out[d + k];
  }
  for (int64_t k = 0; d < a.cols; ++d, ++k) sums[k] += out[d] * out[d];
  for (int64_t width = kSums / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) sums[k] += sums[k + width];
  }
  const T norm = std::sqrt(sums[0]);
  const T inverse = inverse_norm(norm);
  for (d = 0; d < a.cols; ++d) out[d] *= inverse;
  a.norm[row] = norm;
}

// Moments of chunks of fixed size, merged from the first to the last.
template <typename T>
void write_stats_in_order(const NormStatsArgs<T>& a) {
  constexpr int64_t kChunk = 256;
  Moments<T> all = {0, T(0), T(0)};
  for (int64_t begin = 0; begin < a.rows; begin += kChunk) {
    const int64_t end = begin + kChunk < a.rows ? begin + kChunk : a.rows;
    Moments<T> chunk = {0, T(0), T(0)};
    add_rows(chunk, a.norm, a.labels, begin, end, int64_t(1), a.ema);
    all = merge(all, chunk);
  }
  write_stats(a, all);
}

}  // namespace fastmargin
