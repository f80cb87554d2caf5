// A block of class centres: made unit rows in scratch, and multiplied with panels of embeddings.
// The register tiles are FM_ROWS and FM_COLUMNS rows high; see sweep_kernels.h.
//
// A block stays in the L2 cache. Its cosines with a panel of embeddings are a tile of
// [classes][lanes] in the L1 cache: each lane is one embedding, so that sums over classes need no
// shuffles.
#pragma once

#include "simd.h"
#include "sweep.h"

namespace fastmargin::cpu {
namespace {

constexpr int64_t kBlockBytes = 256 * 1024;  // unit centres of a block, in the L2 cache
constexpr int64_t kMaxClasses = 16 * FM_ROWS;

static_assert(kLanes<float> % FM_COLUMNS == 0 && kLanes<double> % FM_COLUMNS == 0);

template <typename T>
constexpr T kInfinity = __builtin_huge_val();

template <typename T>
int64_t block_classes(int64_t dim) {
  const int64_t fit = kBlockBytes / (static_cast<int64_t>(sizeof(T)) * dim) / FM_ROWS * FM_ROWS;
  return fit < FM_ROWS ? FM_ROWS : fit > kMaxClasses ? kMaxClasses : fit;
}

FM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- products -----------------------------------------------------------------------------------

// c[m][lane] (+)= sum_k a[k / lanes][m][k % lanes] * b[k][lane] for FM_ROWS rows m.
template <typename T, bool kAccumulate>
[[gnu::noinline]] void multiply_rows(const T* a, int64_t a_panel, int64_t panels, const T* b, T* c,
                                     int64_t c_row) {
  constexpr int64_t kWidth = Simd<T>::kWidth, kPanel = kLanes<T>;
  Vec<T> sum[FM_ROWS][2] = {};
  if (kAccumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < FM_ROWS; ++m) {
      sum[m][0] = load(c + m * c_row);
      sum[m][1] = load(c + m * c_row + kWidth);
    }
  }
  for (int64_t panel = 0; panel < panels; ++panel, a += a_panel) {
    for (int64_t k = 0; k < kPanel; ++k, b += kPanel) {
      const Vec<T> b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < FM_ROWS; ++m) {
        const Vec<T> value = broadcast(a[m * kPanel + k]);
        sum[m][0] += value * b0;
        sum[m][1] += value * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < FM_ROWS; ++m) {
    store(c + m * c_row, sum[m][0]);
    store(c + m * c_row + kWidth, sum[m][1]);
  }
}

// c[m][lane] += sum_k a[k][m] * b[k][lane] for FM_COLUMNS rows m.
template <typename T>
[[gnu::noinline]] void multiply_columns(const T* a, int64_t count, const T* b, T* c,
                                        int64_t c_row) {
  constexpr int64_t kWidth = Simd<T>::kWidth, kPanel = kLanes<T>;
  Vec<T> sum[FM_COLUMNS][2] = {};
  for (int64_t k = 0; k < count; ++k, a += kPanel, b += kPanel) {
    const Vec<T> b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < FM_COLUMNS; ++m) {
      const Vec<T> value = broadcast(a[m]);
      sum[m][0] += value * b0;
      sum[m][1] += value * b1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < FM_COLUMNS; ++m) {
    store(c + m * c_row, load(c + m * c_row) + sum[m][0]);
    store(c + m * c_row + kWidth, load(c + m * c_row + kWidth) + sum[m][1]);
  }
}

// ---- centres ------------------------------------------------------------------------------------

// A block of unit centres, [dim / lanes][capacity][lanes], and 1 / norm (0 for a zero centre).
// Empty places are zero.
template <typename T>
struct Block {
  T* unit;
  T* inverse_norm;
  int64_t capacity;
  int64_t count;
  bool gaps;  // there are empty places among them
};

// The processor does not foresee where the next row of an index lies.
template <typename In>
FM_INLINE void prefetch(const In* row, int64_t dim) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(In));
  for (int64_t k = 0; k < dim; k += kLine) __builtin_prefetch(row + k);
}

template <typename T, typename In>
void read_block(const Centres& centres, int64_t first, int64_t dim, Block<T>& block) {
  constexpr int64_t kPanel = kLanes<T>;
  const In* data = static_cast<const In*>(centres.data);
  const int64_t used = round_up(block.count, FM_ROWS), stride = block.capacity * kPanel;
  block.gaps = false;
  for (int64_t j = 0; j < block.count; ++j) block.gaps |= centres.row(first + j) < 0;
  const bool part = block.count < used || block.gaps;
  for (int64_t start = part ? 0 : centres.dim / kPanel * kPanel; start < dim; start += kPanel) {
    T* panel = block.unit + start / kPanel * stride;
    for (int64_t i = 0; i < used * kPanel; ++i) panel[i] = 0;
  }
  if (centres.col_stride == 1) {
    // a row at a time: rows of an index are anywhere, and each is read in one go
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t row = centres.row(first + j);
      if (row < 0) continue;
      const In* from = data + row * centres.row_stride;
      if (centres.index != nullptr && j + 1 < block.count) {
        const int64_t next = centres.row(first + j + 1);
        if (next >= 0) prefetch(data + next * centres.row_stride, centres.dim);
      }
      T* to = block.unit + j * kPanel;
      int64_t start = 0;
      for (; start + kPanel <= centres.dim; start += kPanel, to += stride) {
        for (int64_t k = 0; k < kPanel; ++k) to[k] = static_cast<T>(widen(from[start + k]));
      }
      for (int64_t k = 0; start + k < centres.dim; ++k) {
        to[k] = static_cast<T>(widen(from[start + k]));
      }
    }
  } else {  // a transposed matrix: neighbours in memory are rows
    for (int64_t column = 0; column < centres.dim; ++column) {
      const In* from = data + column * centres.col_stride;
      T* to = block.unit + column / kPanel * stride + column % kPanel;
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t row = centres.row(first + j);
        if (row >= 0) to[j * kPanel] = static_cast<T>(widen(from[row * centres.row_stride]));
      }
    }
  }
  for (int64_t j = 0; j < block.count; ++j) {
    double partial[8] = {};
    for (int64_t start = 0; start < dim; start += kPanel) {
      const T* row = block.unit + start / kPanel * stride + j * kPanel;
      for (int64_t k = 0; k < kPanel; ++k) {
        partial[k % 8] += static_cast<double>(row[k]) * static_cast<double>(row[k]);
      }
    }
    double square = 0;
    for (double part : partial) square += part;
    const double norm = __builtin_sqrt(square);
    const T inverse = norm > 1e-12 ? static_cast<T>(1 / norm) : T(0);
    block.inverse_norm[j] = inverse;
    for (int64_t start = 0; start < dim; start += kPanel) {
      T* row = block.unit + start / kPanel * stride + j * kPanel;
      for (int64_t k = 0; k < kPanel; ++k) row[k] *= inverse;
    }
  }
}

// Calls f with a pointer to the element type of the centres.
template <typename F>
FM_INLINE void with_element(Element element, F&& f) {
  switch (element) {
    case Element::kFloat:
      return f(static_cast<float*>(nullptr));
    case Element::kDouble:
      return f(static_cast<double*>(nullptr));
    case Element::kHalf:
      return f(static_cast<Half16*>(nullptr));
    case Element::kBFloat16:
      return f(static_cast<Brain16*>(nullptr));
  }
}

template <typename T>
void read_block(const Centres& centres, int64_t first, int64_t dim, Block<T>& block) {
  with_element(centres.element, [&](auto* in) {
    read_block<T, std::remove_pointer_t<decltype(in)>>(centres, first, dim, block);
  });
}

// ---- cosines of a block with a panel ------------------------------------------------------------

// tile[class][lane]; the rows up to the next multiple of FM_ROWS are zero.
template <typename T>
void cosines(const Batch<T>& batch, const Block<T>& block, int64_t panel, T* tile) {
  constexpr int64_t kPanel = kLanes<T>;
  const T* x = batch.by_column + panel * batch.dim * kPanel;
  for (int64_t j = 0; j < block.count; j += FM_ROWS) {
    multiply_rows<T, false>(block.unit + j * kPanel, block.capacity * kPanel, batch.dim / kPanel, x,
                            tile + j * kPanel, kPanel);
  }
}

// An empty place has a cosine of -inf: no part in a sum, a maximum or a gradient.
template <typename T>
void leave_out_gaps(const Centres& centres, const Block<T>& block, int64_t first, T* tile) {
  if (!block.gaps) return;
  constexpr int64_t kPanel = kLanes<T>;
  for (int64_t j = 0; j < block.count; ++j) {
    if (centres.row(first + j) >= 0) continue;
    for (int64_t lane = 0; lane < kPanel; ++lane) tile[j * kPanel + lane] = -kInfinity<T>;
  }
}

// Calls f(lane, element of the tile) for each row whose target is in this block.
template <typename T, typename F>
FM_INLINE void for_targets(const Batch<T>& batch, int64_t panel, int64_t first, int64_t count,
                           T* tile, F&& f) {
  constexpr int64_t kPanel = kLanes<T>;
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t j = batch.label[panel * kPanel + lane] - first;
    if (j >= 0 && j < count) f(lane, tile[j * kPanel + lane]);
  }
}

}  // namespace
}  // namespace fastmargin::cpu
