// Argument checks of the leaf operators, and the schemas that a CPU and a CUDA build share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "margin_rows.h"
#include "numeric.h"
#include "row_prologue.h"

// A leaf operator writes into tensors that its Python caller allocated. The first argument is what
// the CUDA variant has on top.
#define FM_ROW_PROLOGUE_SCHEMA(extra)                                                 \
  "(Tensor x, Tensor? labels, Tensor? ema_mean, Tensor? ema_std, float[] ema_params," \
  " Tensor(a!) x_hat, Tensor(b!) norm, Tensor(c!) mean, Tensor(d!) std" extra ") -> ()"

#define FM_MARGIN_ROWS_SCHEMA(extra)                                                        \
  "(Tensor cos_y, Tensor lse_neg, Tensor norm, Tensor labels, float[] params, int[] codes," \
  " Tensor? mean, Tensor? std, Tensor? table, Tensor(a!) loss, Tensor(b!) by_cos,"          \
  " Tensor(c!) by_lse, Tensor(d!) by_norm, Tensor(e!) margin" extra ") -> ()"

namespace fastmargin {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct ScalarTypeOf;
template <>
struct ScalarTypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct ScalarTypeOf<double> {
  static constexpr ScalarType value = ScalarType::Double;
};
template <>
struct ScalarTypeOf<int64_t> {
  static constexpr ScalarType value = ScalarType::Long;
};

// Pointer to a contiguous tensor of `count` elements of T on the device of `like`.
template <typename T>
T* checked(const Tensor& tensor, int64_t count, const Tensor& like, const char* name) {
  using Element = std::remove_const_t<T>;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarTypeOf<Element>::value, "fastmargin: ", name,
                  " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == count, "fastmargin: ", name, " has ", tensor.numel(),
                  " elements, expected ", count);
  STD_TORCH_CHECK(tensor.is_contiguous(), "fastmargin: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.device() == like.device(), "fastmargin: ", name,
                  " is on another device than the first argument");
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

template <typename T>
T* checked(const std::optional<Tensor>& tensor, int64_t count, const Tensor& like,
           const char* name) {
  STD_TORCH_CHECK(tensor.has_value(), "fastmargin: ", name, " is missing");
  return checked<T>(*tensor, count, like, name);
}

// Calls f with a value of the storage type of x, one of float, Half, BFloat16 and double.
template <typename F>
void dispatch_input(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Double:
      return f(double());
    default:
      STD_TORCH_CHECK(false, "fastmargin: x must be float32, float64, float16 or bfloat16");
  }
}

template <typename In>
UnitRowsArgs<In> unit_rows_args(const Tensor& x, const std::optional<Tensor>& labels,
                                const Tensor& x_hat, const Tensor& norm) {
  STD_TORCH_CHECK(x.dim() == 2, "fastmargin: x must have 2 dimensions, not ", x.dim());
  UnitRowsArgs<In> args;
  args.x = static_cast<const In*>(x.const_data_ptr());
  args.rows = x.size(0);
  args.cols = x.size(1);
  args.labels =
      labels.has_value() ? checked<const int64_t>(labels, args.rows, x, "labels") : nullptr;
  args.row_stride = x.stride(0);
  args.col_stride = x.stride(1);
  args.x_hat = checked<Compute<In>>(x_hat, args.rows * args.cols, x, "x_hat");
  args.norm = checked<Compute<In>>(norm, args.rows, x, "norm");
  return args;
}

// Of an x whose unit rows are asked for with the statistics.
template <typename T>
NormStatsArgs<T> norm_stats_args(const Tensor& x, const std::optional<Tensor>& labels,
                                 const std::optional<Tensor>& ema_mean,
                                 const std::optional<Tensor>& ema_std,
                                 const std::vector<double>& ema_params, const Tensor& norm,
                                 const Tensor& mean, const Tensor& std) {
  STD_TORCH_CHECK(ema_params.size() == 3, "fastmargin: ema_params must be [alpha, low, high]");
  NormStatsArgs<T> args;
  args.rows = x.size(0);
  args.norm = checked<const T>(norm, args.rows, x, "norm");
  args.labels = checked<const int64_t>(labels, args.rows, x, "labels");
  args.ema = {static_cast<T>(ema_params[0]), static_cast<T>(ema_params[1]),
              static_cast<T>(ema_params[2])};
  args.old_mean = checked<const T>(ema_mean, 1, x, "ema_mean");
  args.old_std = checked<const T>(ema_std, 1, x, "ema_std");
  args.new_mean = checked<T>(mean, 1, x, "mean");
  args.new_std = checked<T>(std, 1, x, "std");
  return args;
}

template <typename Code>
Code checked_code(int64_t code, const char* name) {
  STD_TORCH_CHECK(code >= 0 && code < static_cast<int64_t>(Code::kCount), "fastmargin: ", name,
                  " has no code ", code);
  return static_cast<Code>(code);
}

// MarginForm.params() and MarginForm.codes().
template <typename T>
MarginRule<T> checked_rule(const std::vector<double>& params, const std::vector<int64_t>& codes) {
  STD_TORCH_CHECK(static_cast<int64_t>(params.size()) == kMarginParams,
                  "fastmargin: ", kMarginParams, " margin parameters expected, got ",
                  params.size());
  STD_TORCH_CHECK(codes.size() == 3, "fastmargin: codes must be [source, guard, grad]");
  MarginParams p;
  std::memcpy(&p, params.data(), sizeof(p));
  return margin_rule<T>(p, checked_code<Source>(codes[0], "source"),
                        checked_code<Guard>(codes[1], "guard"),
                        checked_code<GradMode>(codes[2], "grad"));
}

template <typename T>
MarginState<T> checked_state(Source source, const std::optional<Tensor>& mean,
                             const std::optional<Tensor>& std, const std::optional<Tensor>& table,
                             int64_t rows, const Tensor& like) {
  MarginState<T> state = {nullptr, nullptr, nullptr, 0};
  if (source == Source::kAdaFace) {
    state.mean = checked<const T>(mean, 1, like, "mean");
    state.std = checked<const T>(std, 1, like, "std");
  } else if (source == Source::kClass) {
    state.table_size = table.has_value() ? table->numel() : 0;
    STD_TORCH_CHECK(state.table_size > 0, "fastmargin: a margin by class needs its table");
    state.table = checked<const T>(table, state.table_size, like, "table");
  } else if (source == Source::kRow) {
    state.table_size = rows;
    state.table = checked<const T>(table, rows, like, "table");
  }
  return state;
}

template <typename T>
MarginRowsArgs<T> margin_rows_args(const Tensor& cos_y, const Tensor& lse_neg, const Tensor& norm,
                                   const Tensor& labels, const std::vector<double>& params,
                                   const std::vector<int64_t>& codes,
                                   const std::optional<Tensor>& mean,
                                   const std::optional<Tensor>& std,
                                   const std::optional<Tensor>& table, const Tensor& loss,
                                   const Tensor& by_cos, const Tensor& by_lse,
                                   const Tensor& by_norm, const Tensor& margin) {
  MarginRowsArgs<T> args;
  args.rows = cos_y.numel();
  args.cos_y = checked<const T>(cos_y, args.rows, cos_y, "cos_y");
  args.lse_neg = checked<const T>(lse_neg, args.rows, cos_y, "lse_neg");
  args.norm = checked<const T>(norm, args.rows, cos_y, "norm");
  args.labels = checked<const int64_t>(labels, args.rows, cos_y, "labels");
  args.rule = checked_rule<T>(params, codes);
  args.state = checked_state<T>(args.rule.source, mean, std, table, args.rows, cos_y);
  args.loss = checked<T>(loss, args.rows, cos_y, "loss");
  args.by_cos = checked<T>(by_cos, args.rows, cos_y, "by_cos");
  args.by_lse = checked<T>(by_lse, args.rows, cos_y, "by_lse");
  args.by_norm = checked<T>(by_norm, args.rows, cos_y, "by_norm");
  args.margin = checked<T>(margin, args.rows, cos_y, "margin");
  return args;
}

}  // namespace fastmargin
