// The per-row operators of the CPU backend: fastmargin::cpu_row_prologue and cpu_margin_rows.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "checks.h"

namespace fastmargin {
namespace {

// Rows that are worth a thread: the exponentials of margin_rows, the bytes of row_prologue.
constexpr int64_t kMarginRowsGrain = 1024;
constexpr int64_t kPrologueGrainElements = 32768;

void row_prologue(const Tensor& x, const std::optional<Tensor>& labels,
                  const std::optional<Tensor>& ema_mean, const std::optional<Tensor>& ema_std,
                  const std::vector<double>& ema_params, const Tensor& x_hat, const Tensor& norm,
                  const Tensor& mean, const Tensor& std) {
  dispatch_input(x, [&](auto input) {
    using In = decltype(input);
    using T = Compute<In>;
    const UnitRowsArgs<In> rows = unit_rows_args<In>(x, labels, x_hat, norm);
    const int64_t grain = kPrologueGrainElements / (rows.cols + 1) + 1;
    torch::stable::parallel_for(0, rows.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) write_unit_row(rows, row);
    });
    if (ema_mean.has_value()) {
      write_stats_in_order(
          norm_stats_args<T>(x, labels, ema_mean, ema_std, ema_params, norm, mean, std));
    } else {
      *checked<T>(mean, 1, x, "mean") = std::numeric_limits<T>::quiet_NaN();
      *checked<T>(std, 1, x, "std") = std::numeric_limits<T>::quiet_NaN();
    }
  });
}

void margin_rows(const Tensor& cos_y, const Tensor& lse_neg, const Tensor& norm,
                 const Tensor& labels, const std::vector<double>& params,
                 const std::vector<int64_t>& codes, const std::optional<Tensor>& mean,
                 const std::optional<Tensor>& std, const std::optional<Tensor>& table,
                 const Tensor& loss, const Tensor& by_cos, const Tensor& by_lse,
                 const Tensor& by_norm, const Tensor& margin) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    const MarginRowsArgs<T> args =
        margin_rows_args<T>(cos_y, lse_neg, norm, labels, params, codes, mean, std, table, loss,
                            by_cos, by_lse, by_norm, margin);
    torch::stable::parallel_for(0, args.rows, kMarginRowsGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) write_margin_row(args, row);
    });
  };
  if (cos_y.scalar_type() == ScalarType::Double) return run(double());
  run(float());
}

}  // namespace
}  // namespace fastmargin

STABLE_TORCH_LIBRARY_FRAGMENT(fastmargin, m) {
  m.def("cpu_row_prologue" FM_ROW_PROLOGUE_SCHEMA(""));
  m.def("cpu_margin_rows" FM_MARGIN_ROWS_SCHEMA(""));
}

STABLE_TORCH_LIBRARY_IMPL(fastmargin, CPU, m) {
  m.impl("cpu_row_prologue", TORCH_BOX(&fastmargin::row_prologue));
  m.impl("cpu_margin_rows", TORCH_BOX(&fastmargin::margin_rows));
}
