// fastmargin::cuda_row_prologue.
#include "checks.h"
#include "cuda/entry.h"
#include "cuda/row_prologue.cuh"

namespace fastmargin::cuda {
namespace {

void row_prologue(const Tensor& x, const std::optional<Tensor>& labels,
                  const std::optional<Tensor>& ema_mean, const std::optional<Tensor>& ema_std,
                  const std::vector<double>& ema_params, const Tensor& x_hat, const Tensor& norm,
                  const Tensor& mean, const Tensor& std, int64_t stream) {
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "fastmargin: no float64 on cuda");
  const Entry entry(x, stream);
  const bool stats = ema_mean.has_value();
  float* new_mean = checked<float>(mean, 1, x, "mean");
  float* new_std = checked<float>(std, 1, x, "std");
  dispatch_input(x, [&](auto input) {
    using In = decltype(input);
    if constexpr (!std::is_same_v<In, double>) {
      const UnitRowsLaunch<In> args = {unit_rows_args<In>(x, labels, x_hat, norm),
                                       stats ? nullptr : new_mean, stats ? nullptr : new_std};
      entry.check(unit_rows(args, entry.stream()), "row_prologue");
    }
  });
  if (stats) {
    const NormStatsArgs<float> args =
        norm_stats_args<float>(x, labels, ema_mean, ema_std, ema_params, norm, mean, std);
    entry.check(norm_stats(args, entry.stream()), "row_prologue (statistics)");
  }
}

}  // namespace
}  // namespace fastmargin::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastmargin, m) {
  m.def("cuda_row_prologue" FM_ROW_PROLOGUE_SCHEMA(", int stream"));
}

STABLE_TORCH_LIBRARY_IMPL(fastmargin, CUDA, m) {
  m.impl("cuda_row_prologue", TORCH_BOX(&fastmargin::cuda::row_prologue));
}
