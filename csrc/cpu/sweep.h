// The passes over the class centres, as the operators (row_stats.cpp) call them: plain structs and
// a table of functions for each instruction set.
#pragma once

#include <cstdint>

namespace fastmargin::cpu {

enum class Element { kFloat, kDouble, kHalf, kBFloat16 };

// Raw class centres (C, D), strides in elements, and which of their rows are the columns of a pass:
// all of them, or those in `index`, where a value outside [0, rows) is an empty place.
struct Centres {
  const void* data;
  Element element;
  int64_t rows;
  int64_t row_stride;
  int64_t col_stride;
  int64_t dim;
  const int64_t* index;  // [count], or null
  int64_t count;         // of columns

  // The row behind a column, -1 for an empty place. Inlined: a copy of its own would be one for
  // all instruction sets.
  [[gnu::always_inline]] int64_t row(int64_t column) const {
    if (index == nullptr) return column;
    return index[column] >= 0 && index[column] < rows ? index[column] : -1;
  }
};

// Unit embeddings in the two layouts of the products, padded with zeros, and what belongs to each
// row. `lanes` rows, or `lanes` of the D columns, are a panel; `dim` and `rows` are rounded up.
template <typename T>
struct Batch {
  int64_t rows;
  int64_t dim;
  const T* by_column;    // [rows / lanes][dim][lanes]: lanes are embeddings
  const T* by_row;       // [dim / lanes][rows][lanes]: lanes are columns; backward only
  const int64_t* label;  // [rows] column of the own centre, negative where it has none here
  T scale;
  const T* threshold;  // [rows] of the hard rule a c^2 + b c + d, or null
  T a, b, d;
};

// Partial results of one slot of columns. `sum` and `pull` are relative to exp(max_logit).
template <typename T>
struct Partial {
  T* max_logit;  // [rows]
  T* max_neg;    // [rows]
  double* sum;   // [rows]
  T* pull;       // [rows][dim], or null
};

// Upstream gradients, padded.
template <typename T>
struct Upstream {
  const T* exp_weight;  // [rows] scale * d_lse
  const T* lse;         // [rows] lse_neg, +inf in a row without negatives
  const T* d_cos;       // [rows]
};

// A step of SGD. The momentum is (rows, D) as the centres, with columns side by side, or null.
template <typename T>
struct Update {
  void* weight;  // what Centres reads
  T* momentum;
  int64_t momentum_stride;
  T lr, momentum_factor, weight_decay;
  bool nesterov;
};

struct Range {
  int64_t begin;
  int64_t end;
};

// Whether cosine a comes before b among the nearest: the larger one, and NaN first, as in
// torch.topk, so that a centre of NaN is seen. Inlined for the reason given at Centres::row.
template <typename T>
[[gnu::always_inline]] inline bool is_nearer(T a, T b) {
  return !(a <= b) && b == b;
}

template <typename T>
struct Kernels {
  int64_t lanes;

  // Elements of T that a call needs as scratch, aligned to 64 bytes.
  int64_t (*scratch)(int64_t dim);

  // Adds the columns `classes` to the partial results of the rows in `panels`, and writes cos_y of
  // the rows whose label is among them.
  void (*forward)(const Batch<T>&, const Centres&, Range panels, Range classes, const Partial<T>&,
                  T* cos_y, T* scratch);

  // Writes the gradient of the columns `classes` into the contiguous (count, D) of their type.
  void (*backward)(const Batch<T>&, const Centres&, Range classes, const Upstream<T>&,
                   void* d_centres, T* scratch);

  // Steps the rows behind the columns `classes` along that gradient. Columns of the centres lie
  // side by side.
  void (*step)(const Batch<T>&, const Centres&, Range classes, const Upstream<T>&, const Update<T>&,
               T* scratch);

  // Merges the columns `classes` into the k best negatives, values [rows][k] and index [rows][k],
  // in descending order; writes cos_y as `forward` does.
  void (*nearest)(const Batch<T>&, const Centres&, Range panels, Range classes, int64_t k,
                  T* values, int64_t* index, T* cos_y, T* scratch);
};

template <typename T>
Kernels<T> scalar_kernels();
template <typename T>
Kernels<T> avx2_kernels();
template <typename T>
Kernels<T> avx512_kernels();

}  // namespace fastmargin::cpu
