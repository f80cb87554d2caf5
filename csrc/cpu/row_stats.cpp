// The passes over the class centres as operators: fastmargin::cpu_row_stats,
// cpu_row_stats_backward, cpu_centre_step and cpu_row_topk. This file packs the batch, cuts the
// work into items for the threads and merges their results; the arithmetic is in sweep_kernels.h.
//
// Items and the order of the merge depend on shapes and the number of threads only, so a result is
// the same in every run.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "capability.h"
#include "sweep.h"

namespace fastmargin::cpu {
namespace {

constexpr int64_t kMinClasses = 256;    // of an item: below, its start costs more than it saves
constexpr int64_t kRowsPerGroup = 256;  // of an item, where there are threads to share the rows

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <typename T>
Kernels<T> kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) return avx512_kernels<T>();
  if (capability() == Capability::kAvx2) return avx2_kernels<T>();
#endif
  return scalar_kernels<T>();
}

// Uninitialised memory on a cache line's border, as the kernels want it.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t bytes = std::max<int64_t>(64, round_up(count * sizeof(T), 64));
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(data_ != nullptr, "fastmargin: no memory for ", bytes, " bytes");
  }
  Buffer(int64_t count, T value) : Buffer(count) { std::fill_n(data_.get(), count, value); }

  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data_;
};

// A (B,) tensor, padded.
template <typename T>
Buffer<T> padded(const Tensor& values, int64_t rows, const Tensor& like, int64_t size, T fill,
                 const char* name) {
  Buffer<T> out(size, fill);
  std::copy_n(checked<const T>(values, rows, like, name), rows, out.get());
  return out;
}

struct HardParams {
  const std::optional<Tensor>& threshold;
  double a, b, d;
};

// A checked batch and its packed copies.
template <typename T>
class PackedBatch {
 public:
  PackedBatch(const Tensor& x_hat, const Tensor& labels, int64_t class_start,
              const Centres& centres, double scale, const HardParams& hard, int64_t lanes,
              bool want_rows)
      : count_(x_hat.size(0)),
        dim_(x_hat.size(1)),
        lanes_(lanes),
        rows_(round_up(count_, lanes)),
        padded_dim_(round_up(dim_, lanes)),
        by_column_(rows_ * padded_dim_, T(0)),
        by_row_(want_rows ? rows_ * padded_dim_ : 0, T(0)),
        label_(rows_, int64_t(-1)),
        threshold_(rows_, std::numeric_limits<T>::infinity()),
        hard_(hard.threshold.has_value()) {
    const T* x = checked<const T>(x_hat, count_ * dim_, x_hat, "x_hat");
    const int64_t* y = checked<const int64_t>(labels, count_, x_hat, "labels");
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t k = 0; k < dim_; ++k) {
        const T value = x[i * dim_ + k];
        by_column_[(i / lanes * padded_dim_ + k) * lanes + i % lanes] = value;
        if (want_rows) by_row_[(k / lanes * rows_ + i) * lanes + k % lanes] = value;
      }
      // no overflow: a label below class_start is foreign, whatever its value
      const bool own = y[i] >= class_start && y[i] - class_start < centres.count;
      label_[i] = own && centres.row(y[i] - class_start) >= 0 ? y[i] - class_start : -1;
    }
    if (hard_) {
      std::copy_n(checked<const T>(hard.threshold, count_, x_hat, "hard_threshold"), count_,
                  threshold_.get());
    }
    view_ = {rows_,
             padded_dim_,
             by_column_.get(),
             by_row_.get(),
             label_.get(),
             static_cast<T>(scale),
             hard_ ? threshold_.get() : nullptr,
             static_cast<T>(hard.a),
             static_cast<T>(hard.b),
             static_cast<T>(hard.d)};
  }

  int64_t count() const { return count_; }
  int64_t dim() const { return dim_; }
  int64_t rows() const { return rows_; }
  int64_t padded_dim() const { return padded_dim_; }
  int64_t panels() const { return rows_ / lanes_; }
  const Batch<T>& view() const { return view_; }

 private:
  int64_t count_, dim_, lanes_, rows_, padded_dim_;
  Buffer<T> by_column_, by_row_;
  Buffer<int64_t> label_;
  Buffer<T> threshold_;
  bool hard_;
  Batch<T> view_;
};

Centres centres_of(const Tensor& weight, const std::optional<Tensor>& index, const Tensor& x_hat) {
  STD_TORCH_CHECK(x_hat.dim() == 2 && weight.dim() == 2 && x_hat.size(1) == weight.size(1),
                  "fastmargin: x_hat (B, D) and weight (C, D) do not fit");
  STD_TORCH_CHECK(weight.device() == x_hat.device(), "fastmargin: weight is on another device");
  const auto element = [&] {
    switch (weight.scalar_type()) {
      case ScalarType::Float:
        return Element::kFloat;
      case ScalarType::Double:
        return Element::kDouble;
      case ScalarType::Half:
        return Element::kHalf;
      case ScalarType::BFloat16:
        return Element::kBFloat16;
      default:
        STD_TORCH_CHECK(false, "fastmargin: weight must be float32, float64, float16 or bfloat16");
    }
  }();
  const bool indexed = index.has_value();
  return {weight.const_data_ptr(),
          element,
          weight.size(0),
          weight.stride(0),
          weight.stride(1),
          weight.size(1),
          indexed ? checked<const int64_t>(*index, index->numel(), x_hat, "index") : nullptr,
          indexed ? index->numel() : weight.size(0)};
}

// Work items: `groups` of panels times `slots` of classes. Slots share rows, so each has partial
// results of its own; groups do not, but each reads all centres.
struct Grid {
  int64_t panels, classes, groups, slots;

  Grid(int64_t panels, int64_t classes, int64_t lanes) : panels(panels), classes(classes) {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    // so many that at most a tenth of the threads gets nothing
    groups = std::clamp<int64_t>(divide_up(panels * lanes, kRowsPerGroup), 1, threads);
    while (threads % groups * 10 > threads) --groups;
    slots = std::clamp<int64_t>(classes / kMinClasses, 1, threads / groups);
  }

  template <typename F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, groups * slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t slot = item / groups, group = item % groups;
        f(slot, Range{panels * group / groups, panels * (group + 1) / groups},
          Range{classes * slot / slots, classes * (slot + 1) / slots});
      }
    });
  }
};

// Calls f with a value of the type of x_hat.
template <typename F>
void dispatch_compute(const Tensor& x_hat, F&& f) {
  if (x_hat.scalar_type() == ScalarType::Double) return f(double());
  STD_TORCH_CHECK(x_hat.scalar_type() == ScalarType::Float,
                  "fastmargin: x_hat must be float32 or float64");
  f(float());
}

void row_stats(const Tensor& x_hat, const Tensor& weight, const std::optional<Tensor>& index,
               const Tensor& labels, double scale, const std::optional<Tensor>& hard_threshold,
               double a, double b, double d, int64_t class_start, const Tensor& lse_neg,
               const Tensor& cos_y, const Tensor& max_neg, const std::optional<Tensor>& pull) {
  const Centres centres = centres_of(weight, index, x_hat);
  dispatch_compute(x_hat, [&](auto type) {
    using T = decltype(type);
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const Kernels<T> kernel = kernels<T>();
    const PackedBatch<T> batch(x_hat, labels, class_start, centres, scale,
                               {hard_threshold, a, b, d}, kernel.lanes, false);
    const int64_t rows = batch.rows(), dim = batch.padded_dim(), count = batch.count();
    T* lse_out = checked<T>(lse_neg, count, x_hat, "lse_neg");
    T* cos_out = checked<T>(cos_y, count, x_hat, "cos_y");
    T* neg_out = checked<T>(max_neg, count, x_hat, "max_neg");
    T* pull_out = pull.has_value() ? checked<T>(pull, count * batch.dim(), x_hat, "pull") : nullptr;

    const Grid grid(batch.panels(), centres.count, kernel.lanes);
    const int64_t pull_size = pull_out == nullptr ? 0 : rows * dim;
    const Buffer<T> target(rows, T(0)), top(grid.slots * rows, -kInfinity),
        neg(grid.slots * rows, -kInfinity), pulls(grid.slots * pull_size, T(0));
    const Buffer<double> sums(grid.slots * rows, 0.0);
    grid.run([&](int64_t slot, Range panels, Range classes) {
      const Buffer<T> scratch(kernel.scratch(dim));
      kernel.forward(batch.view(), centres, panels, classes,
                     {top.get() + slot * rows, neg.get() + slot * rows, sums.get() + slot * rows,
                      pull_out == nullptr ? nullptr : pulls.get() + slot * pull_size},
                     target.get(), scratch.get());
    });

    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> share(grid.slots);
      for (int64_t i = begin; i < end; ++i) {
        T top_all = -kInfinity, neg_all = -kInfinity;
        for (int64_t slot = 0; slot < grid.slots; ++slot) {
          top_all = std::max(top_all, top[slot * rows + i]);
          neg_all = std::max(neg_all, neg[slot * rows + i]);
        }
        double sum = 0;
        for (int64_t slot = 0; slot < grid.slots; ++slot) {
          const T own = top[slot * rows + i];
          share[slot] = own == -kInfinity ? 0 : std::exp(static_cast<double>(own - top_all));
          sum += share[slot] * sums[slot * rows + i];
        }
        const bool any = !(sum == 0);  // NaN is passed on
        lse_out[i] = any ? static_cast<T>(static_cast<double>(top_all) + std::log(sum)) : top_all;
        cos_out[i] = target[i];
        neg_out[i] = neg_all;
        if (pull_out == nullptr) continue;
        for (int64_t k = 0; k < batch.dim(); ++k) {
          double total = 0;
          for (int64_t slot = 0; slot < grid.slots; ++slot) {
            total += share[slot] * static_cast<double>(pulls[slot * pull_size + i * dim + k]);
          }
          pull_out[i * batch.dim() + k] = any ? static_cast<T>(total / sum) : T(0);
        }
      }
    });
  });
}

// Calls f(kernel, batch, classes, upstream, scratch) for the parts of the centres, on all threads.
template <typename F>
void sweep_backward(const Tensor& d_lse, const Tensor& d_cos, const Tensor& x_hat,
                    const Centres& centres, const Tensor& labels, const Tensor& lse_neg,
                    double scale, const HardParams& hard, int64_t class_start, const F& f) {
  dispatch_compute(x_hat, [&](auto type) {
    using T = decltype(type);
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const Kernels<T> kernel = kernels<T>();
    const PackedBatch<T> batch(x_hat, labels, class_start, centres, scale, hard, kernel.lanes,
                               true);
    const int64_t rows = batch.rows(), count = batch.count();
    const Buffer<T> exp_weight = padded<T>(d_lse, count, x_hat, rows, 0, "d_lse");
    const Buffer<T> cos_grad = padded<T>(d_cos, count, x_hat, rows, 0, "d_cos");
    const Buffer<T> lse = padded<T>(lse_neg, count, x_hat, rows, kInfinity, "lse_neg");
    for (int64_t i = 0; i < count; ++i) {
      exp_weight[i] *= static_cast<T>(scale);
      if (lse[i] == -kInfinity) lse[i] = kInfinity;  // no negatives: every p is 0
    }
    const Upstream<T> upstream = {exp_weight.get(), lse.get(), cos_grad.get()};
    const int64_t classes = centres.count, threads = torch::stable::get_num_threads();
    const int64_t items = std::clamp<int64_t>(classes / kMinClasses, 1, threads);
    torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> scratch(kernel.scratch(batch.padded_dim()));
      f(kernel, batch.view(), Range{classes * begin / items, classes * end / items}, upstream,
        scratch.get());
    });
  });
}

void row_stats_backward(const Tensor& d_lse, const Tensor& d_cos, const Tensor& x_hat,
                        const Tensor& weight, const std::optional<Tensor>& index,
                        const Tensor& labels, const Tensor& lse_neg, double scale,
                        const std::optional<Tensor>& hard_threshold, double a, double b, double d,
                        int64_t class_start, const Tensor& d_weight) {
  const Centres centres = centres_of(weight, index, x_hat);
  STD_TORCH_CHECK(d_weight.scalar_type() == weight.scalar_type() && d_weight.is_contiguous() &&
                      d_weight.numel() == centres.count * centres.dim,
                  "fastmargin: d_weight must be contiguous, a row for each column of the pass, "
                  "of the dtype of weight");
  void* out = d_weight.mutable_data_ptr();
  sweep_backward(
      d_lse, d_cos, x_hat, centres, labels, lse_neg, scale, {hard_threshold, a, b, d}, class_start,
      [&](const auto& kernel, const auto& batch, Range classes, const auto& upstream,
          auto* scratch) { kernel.backward(batch, centres, classes, upstream, out, scratch); });
}

void centre_step(const Tensor& d_lse, const Tensor& d_cos, const Tensor& x_hat,
                 const Tensor& weight, const std::optional<Tensor>& index, const Tensor& labels,
                 const Tensor& lse_neg, double scale, const std::optional<Tensor>& hard_threshold,
                 double a, double b, double d, int64_t class_start,
                 const std::optional<Tensor>& momentum, double lr, double momentum_factor,
                 double weight_decay, bool nesterov) {
  const Centres centres = centres_of(weight, index, x_hat);
  STD_TORCH_CHECK(centres.dim == 1 || centres.col_stride == 1,
                  "fastmargin: columns of weight must lie side by side");
  if (momentum.has_value()) {
    STD_TORCH_CHECK(momentum->scalar_type() == x_hat.scalar_type() &&
                        momentum->device() == weight.device() && momentum->dim() == 2 &&
                        momentum->size(0) == centres.rows && momentum->size(1) == centres.dim &&
                        (centres.dim == 1 || momentum->stride(1) == 1),
                    "fastmargin: momentum must be as weight, of the dtype of x_hat, its columns "
                    "side by side");
  }
  STD_TORCH_CHECK(momentum.has_value() || momentum_factor == 0, "fastmargin: momentum is missing");
  void* weight_out = weight.mutable_data_ptr();
  void* momentum_out = momentum.has_value() ? momentum->mutable_data_ptr() : nullptr;
  const int64_t stride = momentum.has_value() ? momentum->stride(0) : 0;
  sweep_backward(d_lse, d_cos, x_hat, centres, labels, lse_neg, scale, {hard_threshold, a, b, d},
                 class_start,
                 [&](const auto& kernel, const auto& batch, Range classes, const auto& upstream,
                     auto* scratch) {
                   using T = std::remove_reference_t<decltype(*scratch)>;
                   const Update<T> update = {weight_out,
                                             static_cast<T*>(momentum_out),
                                             stride,
                                             static_cast<T>(lr),
                                             static_cast<T>(momentum_factor),
                                             static_cast<T>(weight_decay),
                                             nesterov};
                   kernel.step(batch, centres, classes, upstream, update, scratch);
                 });
}

void row_topk(const Tensor& x_hat, const Tensor& weight, const std::optional<Tensor>& index,
              const Tensor& labels, int64_t class_start, const Tensor& values,
              const Tensor& nearest, const Tensor& cos_y) {
  const Centres centres = centres_of(weight, index, x_hat);
  STD_TORCH_CHECK(values.dim() == 2 && values.size(1) >= 1, "fastmargin: k must be at least 1");
  dispatch_compute(x_hat, [&](auto type) {
    using T = decltype(type);
    const Kernels<T> kernel = kernels<T>();
    const PackedBatch<T> batch(x_hat, labels, class_start, centres, 1, {std::nullopt, 0, 0, 0},
                               kernel.lanes, false);
    const int64_t rows = batch.rows(), count = batch.count(), k = values.size(1);
    T* values_out = checked<T>(values, count * k, x_hat, "values");
    int64_t* nearest_out = checked<int64_t>(nearest, count * k, x_hat, "nearest");
    T* cos_out = checked<T>(cos_y, count, x_hat, "cos_y");

    const Grid grid(batch.panels(), centres.count, kernel.lanes);
    const Buffer<T> target(rows, T(0)),
        best(grid.slots * rows * k, -std::numeric_limits<T>::infinity());
    const Buffer<int64_t> best_index(grid.slots * rows * k, int64_t(-1));
    grid.run([&](int64_t slot, Range panels, Range classes) {
      const Buffer<T> scratch(kernel.scratch(batch.padded_dim()));
      kernel.nearest(batch.view(), centres, panels, classes, k, best.get() + slot * rows * k,
                     best_index.get() + slot * rows * k, target.get(), scratch.get());
    });

    for (int64_t i = 0; i < count; ++i) {
      cos_out[i] = target[i];
      // slots are in ascending order of column: among equals the first one holds the lower index
      std::vector<int64_t> next(grid.slots, 0);
      for (int64_t j = 0; j < k; ++j) {
        int64_t from = 0;
        const auto head = [&](int64_t slot) {
          return next[slot] < k ? best[(slot * rows + i) * k + next[slot]]
                                : -std::numeric_limits<T>::infinity();
        };
        for (int64_t slot = 1; slot < grid.slots; ++slot) {
          if (is_nearer(head(slot), head(from))) from = slot;
        }
        values_out[i * k + j] = head(from);
        nearest_out[i * k + j] =
            next[from] < k ? best_index[(from * rows + i) * k + next[from]] : int64_t(-1);
        ++next[from];
      }
    }
  });
}

}  // namespace
}  // namespace fastmargin::cpu

#define FM_STATS_ARGS                                                                              \
  "Tensor x_hat, Tensor weight, Tensor? index, Tensor labels, float scale, Tensor? hard_threshold" \
  ", float a, float b, float d, int class_start"

STABLE_TORCH_LIBRARY_FRAGMENT(fastmargin, m) {
  m.def("cpu_row_stats(" FM_STATS_ARGS
        ", Tensor(a!) lse_neg, Tensor(b!) cos_y, Tensor(c!) max_neg, Tensor(d!)? pull) -> ()");
  m.def(
      "cpu_row_stats_backward(Tensor d_lse, Tensor d_cos, Tensor x_hat, Tensor weight, Tensor? "
      "index, Tensor labels, Tensor lse_neg, float scale, Tensor? hard_threshold, float a, float "
      "b, float d, "
      "int class_start, Tensor(a!) d_weight) -> ()");
  m.def(
      "cpu_centre_step(Tensor d_lse, Tensor d_cos, Tensor x_hat, Tensor(a!) weight, Tensor? index, "
      "Tensor labels, Tensor lse_neg, float scale, Tensor? hard_threshold, float a, float b, float "
      "d, int class_start, Tensor(b!)? momentum, float lr, float momentum_factor, float "
      "weight_decay, bool nesterov) -> ()");
  m.def(
      "cpu_row_topk(Tensor x_hat, Tensor weight, Tensor? index, Tensor labels, int class_start, "
      "Tensor(a!) values, Tensor(b!) nearest, Tensor(c!) cos_y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmargin, CPU, m) {
  m.impl("cpu_row_stats", TORCH_BOX(&fastmargin::cpu::row_stats));
  m.impl("cpu_row_stats_backward", TORCH_BOX(&fastmargin::cpu::row_stats_backward));
  m.impl("cpu_centre_step", TORCH_BOX(&fastmargin::cpu::centre_step));
  m.impl("cpu_row_topk", TORCH_BOX(&fastmargin::cpu::row_topk));
}
