// fastmargin::cuda_margin_rows.
#include "checks.h"
#include "cuda/entry.h"
#include "cuda/margin_rows.cuh"

namespace fastmargin::cuda {
namespace {

void margin_rows_entry(const Tensor& cos_y, const Tensor& lse_neg, const Tensor& norm,
                       const Tensor& labels, const std::vector<double>& params,
                       const std::vector<int64_t>& codes, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& std, const std::optional<Tensor>& table,
                       const Tensor& loss, const Tensor& by_cos, const Tensor& by_lse,
                       const Tensor& by_norm, const Tensor& margin, int64_t stream) {
  const Entry entry(cos_y, stream);
  const MarginRowsArgs<float> args =
      margin_rows_args<float>(cos_y, lse_neg, norm, labels, params, codes, mean, std, table, loss,
                              by_cos, by_lse, by_norm, margin);
  entry.check(margin_rows(args, entry.stream()), "margin_rows");
}

}  // namespace
}  // namespace fastmargin::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastmargin, m) {
  m.def("cuda_margin_rows" FM_MARGIN_ROWS_SCHEMA(", int stream"));
}

STABLE_TORCH_LIBRARY_IMPL(fastmargin, CUDA, m) {
  m.impl("cuda_margin_rows", TORCH_BOX(&fastmargin::cuda::margin_rows_entry));
}
