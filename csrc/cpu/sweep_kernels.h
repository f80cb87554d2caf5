// The passes over the class centres for one vector width. Included by sweep_scalar.cpp,
// sweep_avx2.cpp and sweep_avx512.cpp, which set FM_VECTOR_BYTES, FM_ROWS and FM_COLUMNS (rows of
// the register tiles) and compile it for their instruction set.
//
// The tile of cosines of a block (centre_block.h) and a panel becomes probabilities in place, and
// is the left operand of the second product while it is still in the cache; no (B, C) matrix
// exists.
#pragma once

#include "centre_block.h"

namespace fastmargin::cpu {
namespace {

constexpr int64_t kGroupPanels = 4;  // embeddings between two visits of the gradient, backward

// The hard rule: f(c), and its slope by c where asked for.
template <typename T>
struct Rule {
  Vec<T> threshold;
  T a, b, d;

  FM_INLINE Vec<T> value(Vec<T> c) const { return c > threshold ? (a * c + b) * c + d : c; }
  FM_INLINE Vec<T> slope(Vec<T> c) const { return c > threshold ? 2 * a * c + b : broadcast<T>(1); }
};

// ---- forward ------------------------------------------------------------------------------------

// Turns one vector column of the tile into exponentials (times the slope) relative to the running
// maximum, and returns by how much earlier sums shrink.
template <typename T, bool kHard>
FM_INLINE Vec<T> exponentials(T* tile, int64_t count, T scale, const Rule<T>& rule, T* max_logit,
                              T* max_neg, double* sum) {
  constexpr int64_t kPanel = kLanes<T>, kWidth = Simd<T>::kWidth;
  Vec<T> top = broadcast<T>(-kInfinity<T>), top_value = top;
  for (int64_t j = 0; j < count; ++j) {
    const Vec<T> c = load(tile + j * kPanel);
    top = c > top ? c : top;
    if (kHard) {
      const Vec<T> value = rule.value(c);
      top_value = value > top_value ? value : top_value;
    }
  }
  const Vec<T> old_neg = load(max_neg), old = load(max_logit);
  store(max_neg, top > old_neg ? top : old_neg);
  const Vec<T> block_max = (kHard ? top_value : top) * scale;
  const Vec<T> now = block_max > old ? block_max : old;
  store(max_logit, now);
  // without any negative so far there is nothing to shift, and -inf - -inf is not a number
  const Vec<T> shift = now == -kInfinity<T> ? Vec<T>{} : now;
  const Vec<T> shrink = exp<T>(old - shift);

  Vec<T> total = {}, total_odd = {};
  for (int64_t j = 0; j < count; ++j) {
    T* at = tile + j * kPanel;
    const Vec<T> c = load(at);
    const Vec<T> e = exp<T>((kHard ? rule.value(c) : c) * scale - shift);
    // two sums: half the roundings of one
    (j & 1 ? total_odd : total) += e;
    store(at, kHard ? e * rule.slope(c) : e);
  }
  total += total_odd;
  for (int64_t i = 0; i < kWidth; ++i) {
    sum[i] = sum[i] * static_cast<double>(shrink[i]) + static_cast<double>(total[i]);
  }
  return shrink;
}

template <typename T, bool kHard>
void forward_tile(const Batch<T>& batch, int64_t row, int64_t count, T* tile,
                  const Partial<T>& partial) {
  constexpr int64_t kPanel = kLanes<T>, kWidth = Simd<T>::kWidth;
  for (int64_t half = 0; half < kPanel; half += kWidth) {
    const int64_t at = row + half;
    Rule<T> rule = {};
    if (kHard) rule = {load(batch.threshold + at), batch.a, batch.b, batch.d};
    const Vec<T> shrink =
        exponentials<T, kHard>(tile + half, count, batch.scale, rule, partial.max_logit + at,
                               partial.max_neg + at, partial.sum + at);
    if (partial.pull == nullptr) continue;
    for (int64_t i = 0; i < kWidth; ++i) {
      if (shrink[i] == 1) continue;
      T* pull = partial.pull + (at + i) * batch.dim;
      for (int64_t k = 0; k < batch.dim; ++k) pull[k] *= shrink[i];
    }
  }
}

template <typename T>
void forward(const Batch<T>& batch, const Centres& centres, Range panels, Range classes,
             const Partial<T>& partial, T* cos_y, T* scratch) {
  constexpr int64_t kPanel = kLanes<T>;
  const int64_t capacity = block_classes<T>(batch.dim);
  Block<T> block = {scratch, scratch + capacity * batch.dim, capacity, 0, false};
  T* tile = block.inverse_norm + round_up(capacity, kPanel);
  for (int64_t first = classes.begin; first < classes.end; first += capacity) {
    const int64_t rest = classes.end - first;
    block.count = rest < capacity ? rest : capacity;
    read_block(centres, first, batch.dim, block);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t row = panel * kPanel;
      cosines(batch, block, panel, tile);
      leave_out_gaps(centres, block, first, tile);
      for_targets(batch, panel, first, block.count, tile, [&](int64_t lane, T& c) {
        cos_y[row + lane] = c;
        c = -kInfinity<T>;
      });
      if (batch.threshold != nullptr) {
        forward_tile<T, true>(batch, row, block.count, tile, partial);
      } else {
        forward_tile<T, false>(batch, row, block.count, tile, partial);
      }
      if (partial.pull == nullptr) continue;
      for (int64_t k = 0; k < batch.dim; k += kPanel) {
        for (int64_t i = 0; i < kPanel; i += FM_COLUMNS) {
          multiply_columns<T>(tile + i, block.count, block.unit + k * capacity,
                              partial.pull + (row + i) * batch.dim + k, batch.dim);
        }
      }
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

// Turns the tile of cosines into the gradient of the cosines.
template <typename T, bool kHard>
void backward_tile(const Batch<T>& batch, int64_t row, int64_t count, const Upstream<T>& upstream,
                   T* tile) {
  constexpr int64_t kPanel = kLanes<T>, kWidth = Simd<T>::kWidth;
  for (int64_t half = 0; half < kPanel; half += kWidth) {
    const int64_t at = row + half;
    Rule<T> rule = {};
    if (kHard) rule = {load(batch.threshold + at), batch.a, batch.b, batch.d};
    const Vec<T> lse = load(upstream.lse + at), weight = load(upstream.exp_weight + at);
    for (int64_t j = 0; j < count; ++j) {
      T* to = tile + half + j * kPanel;
      const Vec<T> c = load(to);
      const Vec<T> p = exp<T>((kHard ? rule.value(c) : c) * batch.scale - lse);
      store(to, kHard ? p * weight * rule.slope(c) : p * weight);
    }
  }
}

// d_centre = (d_unit - <d_unit, unit> unit) / norm of the j-th of a block; calls f(column, value).
template <typename T, typename F>
FM_INLINE void through_norm(const Block<T>& block, int64_t j, int64_t dim, int64_t columns,
                            const T* d_unit, const F& f) {
  constexpr int64_t kPanel = kLanes<T>, kWidth = Simd<T>::kWidth;
  const T* unit = block.unit + j * kPanel;
  Vec<T> dot = {};
  for (int64_t k = 0; k < dim; k += kPanel) {
    const T* u = unit + k * block.capacity;
    dot += load(d_unit + k) * load(u) + load(d_unit + k + kWidth) * load(u + kWidth);
  }
  const T radial = horizontal_sum<T>(dot), inverse = block.inverse_norm[j];
  for (int64_t k = 0; k < columns; k += kPanel) {
    const T* u = unit + k * block.capacity;
    const int64_t width = columns - k < kPanel ? columns - k : kPanel;
    for (int64_t i = 0; i < width; ++i) f(k + i, (d_unit[k + i] - radial * u[i]) * inverse);
  }
}

// In the type of the centres.
template <typename T, typename Out>
void write_gradient(const Block<T>& block, int64_t dim, int64_t columns, const T* d_unit, Out* to) {
  for (int64_t j = 0; j < block.count; ++j, d_unit += dim, to += columns) {
    through_norm(block, j, dim, columns, d_unit,
                 [&](int64_t k, T value) { narrow(value, to + k); });
  }
}

// As torch.optim.SGD; momentum of zeros is what torch calls none.
template <typename T, typename In>
void step_rows(const Block<T>& block, const Centres& centres, int64_t first, int64_t dim,
               const T* d_unit, const Update<T>& update, In* weight) {
  const T lr = update.lr, factor = update.momentum_factor, decay = update.weight_decay;
  for (int64_t j = 0; j < block.count; ++j, d_unit += dim) {
    const int64_t row = centres.row(first + j);
    if (row < 0) continue;
    In* __restrict__ w = weight + row * centres.row_stride;
    if (factor == 0) {
      through_norm(block, j, dim, centres.dim, d_unit, [&](int64_t k, T value) {
        const T old = static_cast<T>(widen(w[k]));
        narrow(old - lr * (value + decay * old), w + k);
      });
      continue;
    }
    // the share of the gradient itself in the direction, beside the momentum's
    const T own = update.nesterov ? T(1) : T(0), rest = update.nesterov ? factor : T(1);
    T* __restrict__ m = update.momentum + row * update.momentum_stride;
    through_norm(block, j, dim, centres.dim, d_unit, [&](int64_t k, T value) {
      const T old = static_cast<T>(widen(w[k])), gradient = value + decay * old;
      const T heavy = factor * m[k] + gradient;
      m[k] = heavy;
      narrow(old - lr * (own * gradient + rest * heavy), w + k);
    });
  }
}

// Calls finish(block, first, d_unit) with the gradient (count, dim) of each block of unit centres.
template <typename T, typename F>
FM_INLINE void sweep_gradient(const Batch<T>& batch, const Centres& centres, Range classes,
                              const Upstream<T>& upstream, T* scratch, const F& finish) {
  constexpr int64_t kPanel = kLanes<T>;
  const int64_t capacity = block_classes<T>(batch.dim), tile_size = capacity * kPanel;
  Block<T> block = {scratch, scratch + capacity * batch.dim, capacity, 0, false};
  T* d_unit = block.inverse_norm + round_up(capacity, kPanel);
  T* tiles = d_unit + capacity * batch.dim;
  const int64_t panels = batch.rows / kPanel;
  for (int64_t first = classes.begin; first < classes.end; first += capacity) {
    const int64_t rest = classes.end - first;
    block.count = rest < capacity ? rest : capacity;
    read_block(centres, first, batch.dim, block);
    for (int64_t i = 0; i < capacity * batch.dim; ++i) d_unit[i] = 0;
    for (int64_t start = 0; start < panels; start += kGroupPanels) {
      const int64_t group = panels - start < kGroupPanels ? panels - start : kGroupPanels;
      for (int64_t panel = start; panel < start + group; ++panel) {
        T* tile = tiles + (panel - start) * tile_size;
        const int64_t row = panel * kPanel;
        cosines(batch, block, panel, tile);
        leave_out_gaps(centres, block, first, tile);
        if (batch.threshold != nullptr) {
          backward_tile<T, true>(batch, row, block.count, upstream, tile);
        } else {
          backward_tile<T, false>(batch, row, block.count, upstream, tile);
        }
        for_targets(batch, panel, first, block.count, tile,
                    [&](int64_t lane, T& g) { g = upstream.d_cos[row + lane]; });
      }
      for (int64_t k = 0; k < batch.dim; k += kPanel) {
        const T* x = batch.by_row + k * batch.rows + start * kPanel * kPanel;
        for (int64_t j = 0; j < block.count; j += FM_ROWS) {
          multiply_rows<T, true>(tiles + j * kPanel, tile_size, group, x,
                                 d_unit + j * batch.dim + k, batch.dim);
        }
      }
    }
    finish(block, first, d_unit);
  }
}

template <typename T>
void backward(const Batch<T>& batch, const Centres& centres, Range classes,
              const Upstream<T>& upstream, void* d_centres, T* scratch) {
  sweep_gradient(batch, centres, classes, upstream, scratch,
                 [&](const Block<T>& block, int64_t first, const T* d_unit) {
                   with_element(centres.element, [&](auto* out) {
                     auto* to = static_cast<decltype(out)>(d_centres) + first * centres.dim;
                     write_gradient(block, batch.dim, centres.dim, d_unit, to);
                   });
                 });
}

template <typename T>
void step(const Batch<T>& batch, const Centres& centres, Range classes, const Upstream<T>& upstream,
          const Update<T>& update, T* scratch) {
  sweep_gradient(batch, centres, classes, upstream, scratch,
                 [&](const Block<T>& block, int64_t first, const T* d_unit) {
                   with_element(centres.element, [&](auto* out) {
                     auto* weight = static_cast<decltype(out)>(update.weight);
                     step_rows(block, centres, first, batch.dim, d_unit, update, weight);
                   });
                 });
}

// ---- nearest negatives --------------------------------------------------------------------------

// Keeps values[k] in descending order. Classes come in ascending order and equal ones stay behind.
template <typename T>
void insert(T value, int64_t index, int64_t k, T* values, int64_t* indices) {
  int64_t at = k - 1;
  for (; at > 0 && is_nearer(value, values[at - 1]); --at) {
    values[at] = values[at - 1];
    indices[at] = indices[at - 1];
  }
  values[at] = value;
  indices[at] = index;
}

template <typename T>
void nearest(const Batch<T>& batch, const Centres& centres, Range panels, Range classes, int64_t k,
             T* values, int64_t* index, T* cos_y, T* scratch) {
  constexpr int64_t kPanel = kLanes<T>, kWidth = Simd<T>::kWidth;
  const int64_t capacity = block_classes<T>(batch.dim);
  Block<T> block = {scratch, scratch + capacity * batch.dim, capacity, 0, false};
  T* tile = block.inverse_norm + round_up(capacity, kPanel);
  for (int64_t first = classes.begin; first < classes.end; first += capacity) {
    const int64_t rest = classes.end - first;
    block.count = rest < capacity ? rest : capacity;
    read_block(centres, first, batch.dim, block);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t row = panel * kPanel;
      cosines(batch, block, panel, tile);
      leave_out_gaps(centres, block, first, tile);
      for_targets(batch, panel, first, block.count, tile, [&](int64_t lane, T& c) {
        cos_y[row + lane] = c;
        c = -kInfinity<T>;
      });
      for (int64_t half = 0; half < kPanel; half += kWidth) {
        Vec<T> top = broadcast<T>(-kInfinity<T>), nan = top;
        for (int64_t j = 0; j < block.count; ++j) {
          const Vec<T> c = load(tile + half + j * kPanel);
          top = c > top ? c : top;
          nan = c == c ? nan : c;
        }
        for (int64_t i = 0; i < kWidth; ++i) {
          T* best = values + (row + half + i) * k;
          int64_t* best_index = index + (row + half + i) * k;
          if (!(top[i] > best[k - 1]) && nan[i] == nan[i]) continue;
          for (int64_t j = 0; j < block.count; ++j) {
            const T c = tile[half + i + j * kPanel];
            if (is_nearer(c, best[k - 1])) insert(c, first + j, k, best, best_index);
          }
        }
      }
    }
  }
}

template <typename T>
int64_t scratch_size(int64_t dim) {
  const int64_t capacity = block_classes<T>(dim);
  return capacity * (2 * dim + kGroupPanels * kLanes<T>)+round_up(capacity, kLanes<T>);
}

template <typename T>
Kernels<T> kernels() {
  return {kLanes<T>, &scratch_size<T>, &forward<T>, &backward<T>, &step<T>, &nearest<T>};
}

}  // namespace
}  // namespace fastmargin::cpu
