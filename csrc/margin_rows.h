// The margin of one row: value, slopes, loss and derivatives, for host and device.
//
// The specification is fastmargin/backends/reference.py (psi_and_slopes, row_factor, margin_rows)
// and the record fastmargin.spec.MarginForm; names and order here are the ones there.
#pragma once

#include <cmath>
#include <cstdint>

#include "numeric.h"

namespace fastmargin {

// MarginForm.PARAMS, in its order. In double, as Python holds them.
struct MarginParams {
  double scale;
  double m2;
  double m3;
  double m2_u;
  double m3_u;
  double cos_eps;
  double angle_eps;
  double h;
  double low;
  double high;
  double eps;
};

// Positions in fastmargin.spec SOURCES, GUARDS and GRAD_MODES.
enum class Source : int64_t { kConstant, kAdaFace, kNorm, kClass, kRow, kCount };
enum class Guard : int64_t { kNone, kClip, kMm, kMmm, kEasy, kCount };
enum class GradMode : int64_t { kExact, kStraightThrough, kCount };

constexpr int64_t kMarginParams = 11;
static_assert(sizeof(MarginParams) == kMarginParams * sizeof(double), "MarginParams: only doubles");

// MarginParams as a kernel wants them: in its own type, with what follows from them worked out
// once, in double.
template <typename T>
struct MarginRule {
  T scale, m2, m3, m2_u, m3_u, h, low, high, eps;
  T cos_limit;   // 1 - cos_eps
  T angle_eps;   // lower end of the clip guard's angle
  T angle_top;   // pi - angle_eps
  T clip_value;  // cos(angle_eps)
  Source source;
  Guard guard;
  GradMode grad;
};

constexpr double kPi = 3.14159265358979323846;

template <typename T>
MarginRule<T> margin_rule(const MarginParams& p, Source source, Guard guard, GradMode grad) {
  MarginRule<T> rule;
  rule.scale = static_cast<T>(p.scale);
  rule.m2 = static_cast<T>(p.m2);
  rule.m3 = static_cast<T>(p.m3);
  rule.m2_u = static_cast<T>(p.m2_u);
  rule.m3_u = static_cast<T>(p.m3_u);
  rule.h = static_cast<T>(p.h);
  rule.low = static_cast<T>(p.low);
  rule.high = static_cast<T>(p.high);
  rule.eps = static_cast<T>(p.eps);
  rule.cos_limit = static_cast<T>(1.0 - p.cos_eps);
  rule.angle_eps = static_cast<T>(p.angle_eps);
  rule.angle_top = static_cast<T>(kPi - p.angle_eps);
  rule.clip_value = static_cast<T>(std::cos(p.angle_eps));
  rule.source = source;
  rule.guard = guard;
  rule.grad = grad;
  return rule;
}

// What the factor u of a row is computed from. Only what the source needs is read.
template <typename T>
struct MarginState {
  const T* mean;   // (1,) adaface
  const T* std;    // (1,) adaface
  const T* table;  // (table_size,) class; (rows,) row
  int64_t table_size;
};

template <typename T>
struct RowFactor {
  T u, by_norm;
};

template <typename T>
FM_HOST_DEVICE RowFactor<T> row_factor(const MarginRule<T>& rule, const MarginState<T>& state,
                                       T norm, int64_t label, int64_t row) {
  if (rule.source == Source::kConstant) return {T(0), T(0)};
  if (rule.source == Source::kRow) return {state.table[row], T(0)};
  if (rule.source == Source::kClass) {
    const bool known = label >= 0 && label < state.table_size;
    return {state.table[known ? label : 0], T(0)};
  }
  const T clipped = clamp(norm, rule.low, rule.high);
  if (rule.source == Source::kNorm) {
    return {clipped, norm >= rule.low && norm <= rule.high ? T(1) : T(0)};
  }
  const T z = (clipped - *state.mean) / (*state.std + rule.eps);
  return {clamp(z * rule.h, T(-1), T(1)), T(0)};
}

template <typename T>
struct Psi {
  T value, by_cos, by_u;
};

// Margin target psi of one cosine and its slopes.
//
// Conditions on the angle compare cosines, since cos falls on [0, pi]: no acos. The 1 / sin(theta)
// of the slope is bounded; the gradient it multiplies vanishes with sin(theta).
template <typename T>
FM_HOST_DEVICE Psi<T> psi_and_slopes(const MarginRule<T>& rule, T cos_y, T u) {
  const T c = clamp(cos_y, -rule.cos_limit, rule.cos_limit);
  const bool inside = cos_y >= -rule.cos_limit && cos_y <= rule.cos_limit;
  const T m2 = rule.m2 + rule.m2_u * u;
  const T m3 = rule.m3 + rule.m3_u * u;
  const SinCos<T> m = sin_cos(m2);
  const T squared = (T(1) - c) * (T(1) + c);
  const T sin_t = std::sqrt(squared < T(0) ? T(0) : squared);
  const T divisor = sin_t < SineFloor<T>::value ? SineFloor<T>::value : sin_t;
  T value = c * m.cos - sin_t * m.sin;
  T by_cos = m.cos + c * m.sin / divisor;
  T by_m2 = -(sin_t * m.cos + c * m.sin);

  switch (rule.guard) {
    case Guard::kClip: {
      // theta + m2 below angle_eps, or above pi - angle_eps
      const T below = rule.angle_eps - m2;
      const T above = rule.angle_top - m2;
      const bool low = below > T(0) && c > sin_cos(clamp(below, T(0), T(kPi))).cos;
      const bool high = m2 + rule.angle_eps > T(0) && c < sin_cos(clamp(above, T(0), T(kPi))).cos;
      if (low || high) {
        value = low ? rule.clip_value : -rule.clip_value;
        by_cos = by_m2 = T(0);
      }
      break;
    }
    case Guard::kMm:
    case Guard::kMmm:
      if (m2 > T(0) && c <= -m.cos) {
        const bool mm = rule.guard == Guard::kMm;
        value = mm ? c - m2 * m.sin : c - T(1) + m.cos;
        by_cos = T(1);
        by_m2 = mm ? -(m.sin + m2 * m.cos) : -m.sin;
      }
      break;
    case Guard::kEasy:
      if (!(c > T(0))) {
        value = c;
        by_cos = T(1);
        by_m2 = T(0);
      }
      break;
    default:
      break;
  }
  if (rule.grad == GradMode::kStraightThrough) by_cos = T(1);
  return {value - m3, inside ? by_cos : T(0), rule.m2_u * by_m2 - rule.m3_u};
}

template <typename T>
struct MarginRow {
  T loss, by_cos, by_lse, by_norm, margin;
};

// loss = -log sigmoid(scale * psi - lse_neg) and its derivatives.
template <typename T>
FM_HOST_DEVICE MarginRow<T> margin_row(const MarginRule<T>& rule, T cos_y, T lse_neg,
                                       RowFactor<T> factor) {
  const Psi<T> psi = psi_and_slopes(rule, cos_y, factor.u);
  const T gap = lse_neg - rule.scale * psi.value;
  // 1 - p_y as a sigmoid of the gap keeps its digits where p_y -> 1; one exponential that cannot
  // overflow serves it and the loss
  const T e = std::exp(-std::fabs(gap));
  const T miss = (gap > T(0) ? T(1) : e) / (T(1) + e);
  const T loss = (gap > T(0) ? gap : T(0)) + std::log1p(e);
  const T by_psi = -rule.scale * miss;
  return {loss, by_psi * psi.by_cos, miss, by_psi * psi.by_u * factor.by_norm, cos_y - psi.value};
}

// All rows at once; every array is (rows,) and contiguous.
template <typename T>
struct MarginRowsArgs {
  const T* cos_y;
  const T* lse_neg;
  const T* norm;
  const int64_t* labels;
  MarginState<T> state;
  MarginRule<T> rule;
  int64_t rows;
  T* loss;
  T* by_cos;
  T* by_lse;
  T* by_norm;
  T* margin;
};

template <typename T>
FM_HOST_DEVICE void write_margin_row(const MarginRowsArgs<T>& a, int64_t i) {
  MarginRow<T> row = {T(0), T(0), T(0), T(0), T(0)};
  const int64_t label = a.labels[i];
  if (label >= 0) {  // an ignored row may hold anything
    const RowFactor<T> factor = row_factor(a.rule, a.state, a.norm[i], label, i);
    row = margin_row(a.rule, a.cos_y[i], a.lse_neg[i], factor);
  }
  a.loss[i] = row.loss;
  a.by_cos[i] = row.by_cos;
  a.by_lse[i] = row.by_lse;
  a.by_norm[i] = row.by_norm;
  a.margin[i] = row.margin;
}

}  // namespace fastmargin
