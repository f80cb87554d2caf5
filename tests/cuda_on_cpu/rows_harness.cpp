// The row kernels and the row arithmetic behind them, as plain functions for ctypes.
//
// cuda_* run the source in csrc/cuda through the launchers of the library; host_* call the shared
// headers directly. Every function returns "" or what went wrong.
#include "cuda/margin_rows.cuh"
#include "cuda/row_prologue.cuh"
#include "margin_rows.h"
#include "row_prologue.h"

namespace fm = fastmargin;

namespace {

// Pointers, in the order of the fields; torch-free twin of csrc/checks.h.
template <typename In>
fm::UnitRowsArgs<In> unit_rows_args(void* const* p, const int64_t* sizes) {
  using T = fm::Compute<In>;
  return {static_cast<const In*>(p[0]),
          static_cast<const int64_t*>(p[3]),
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          static_cast<T*>(p[1]),
          static_cast<T*>(p[2])};
}

template <typename T>
fm::NormStatsArgs<T> norm_stats_args(void* const* p, const int64_t* sizes, const double* ema) {
  return {static_cast<const T*>(p[2]),
          static_cast<const int64_t*>(p[3]),
          sizes[0],
          {static_cast<T>(ema[0]), static_cast<T>(ema[1]), static_cast<T>(ema[2])},
          static_cast<const T*>(p[4]),
          static_cast<const T*>(p[5]),
          static_cast<T*>(p[6]),
          static_cast<T*>(p[7])};
}

template <typename T>
fm::MarginRowsArgs<T> margin_rows_args(void* const* p, int64_t rows, int64_t table_size,
                                       const double* params, const int64_t* codes) {
  fm::MarginParams named;
  std::memcpy(&named, params, sizeof(named));
  fm::MarginRowsArgs<T> args;
  args.cos_y = static_cast<const T*>(p[0]);
  args.lse_neg = static_cast<const T*>(p[1]);
  args.norm = static_cast<const T*>(p[2]);
  args.labels = static_cast<const int64_t*>(p[3]);
  args.state = {static_cast<const T*>(p[4]), static_cast<const T*>(p[5]),
                static_cast<const T*>(p[6]), table_size};
  args.rule =
      fm::margin_rule<T>(named, static_cast<fm::Source>(codes[0]), static_cast<fm::Guard>(codes[1]),
                         static_cast<fm::GradMode>(codes[2]));
  args.rows = rows;
  args.loss = static_cast<T*>(p[7]);
  args.by_cos = static_cast<T*>(p[8]);
  args.by_lse = static_cast<T*>(p[9]);
  args.by_norm = static_cast<T*>(p[10]);
  args.margin = static_cast<T*>(p[11]);
  return args;
}

const char* text(cudaError_t error) {
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

template <typename In>
const char* cuda_row_prologue(void* const* p, const int64_t* sizes, const double* ema,
                              int64_t max_blocks) {
  using T = fm::Compute<In>;
  T* mean = static_cast<T*>(p[6]);
  T* std = static_cast<T*>(p[7]);
  fm::cuda::UnitRowsLaunch<In> launch = {unit_rows_args<In>(p, sizes), ema ? nullptr : mean,
                                         ema ? nullptr : std};
  cudaError_t error = fm::cuda::unit_rows(launch, nullptr, max_blocks);
  if (error == cudaSuccess && ema) {
    error = fm::cuda::norm_stats(norm_stats_args<T>(p, sizes, ema), nullptr);
  }
  return text(error);
}

template <typename In>
const char* host_row_prologue(void* const* p, const int64_t* sizes, const double* ema) {
  const fm::UnitRowsArgs<In> args = unit_rows_args<In>(p, sizes);
  for (int64_t row = 0; row < args.rows; ++row) fm::write_unit_row(args, row);
  if (ema) fm::write_stats_in_order(norm_stats_args<fm::Compute<In>>(p, sizes, ema));
  return "";
}

template <typename T>
const char* host_margin_rows(void* const* p, int64_t rows, int64_t table_size, const double* params,
                             const int64_t* codes) {
  const auto args = margin_rows_args<T>(p, rows, table_size, params, codes);
  for (int64_t row = 0; row < rows; ++row) fm::write_margin_row(args, row);
  return "";
}

// ---- kernels with a planted fault ----

template <int kFault>
__global__ void faulty_kernel(float* out) {
  __shared__ float shared[64];
  const int i = threadIdx.x;
  if (kFault == 1 && i == 5) return;  // one thread leaves before the barrier
  shared[i] = static_cast<float>(i);
  if (kFault == 2) {  // two barriers, each for some of the threads
    if (i < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kFault != 3) {  // 3: no barrier at all
    __syncthreads();
  }
  float value = shared[63 - i];
  if (kFault == 4) {  // a shuffle that only half of the lanes in its mask reach
    if (i % 2) value += __shfl_xor_sync(0xffffffffu, value, 2);
  } else if (kFault == 5) {  // reads a lane that is not in the mask
    if (i % 2) value += __shfl_xor_sync(0xaaaaaaaau, value, 1);
  } else {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
  }
  out[i] = value;
}

template <int kFault>
const char* launch_faulty(float* out) {
  return text(fm::cuda::launch(faulty_kernel<kFault>, 1, 64, nullptr, out));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void set_order(unsigned order) { cuda_on_cpu::Machine::get().order = order; }

#define ROW_PROLOGUE(name, In)                                                                    \
  const char* cuda_row_prologue_##name(void* const* p, const int64_t* sizes, const double* ema,   \
                                       int64_t max_blocks) {                                      \
    return cuda_row_prologue<In>(p, sizes, ema, max_blocks);                                      \
  }                                                                                               \
  const char* host_row_prologue_##name(void* const* p, const int64_t* sizes, const double* ema) { \
    return host_row_prologue<In>(p, sizes, ema);                                                  \
  }
ROW_PROLOGUE(float32, float)
ROW_PROLOGUE(float64, double)
ROW_PROLOGUE(float16, fm::Half)
ROW_PROLOGUE(bfloat16, fm::BFloat16)

const char* cuda_margin_rows_float32(void* const* p, int64_t rows, int64_t table_size,
                                     const double* params, const int64_t* codes,
                                     int64_t max_blocks) {
  const auto args = margin_rows_args<float>(p, rows, table_size, params, codes);
  return text(fm::cuda::margin_rows(args, nullptr, max_blocks));
}

const char* host_margin_rows_float32(void* const* p, int64_t rows, int64_t table_size,
                                     const double* params, const int64_t* codes) {
  return host_margin_rows<float>(p, rows, table_size, params, codes);
}

const char* host_margin_rows_float64(void* const* p, int64_t rows, int64_t table_size,
                                     const double* params, const int64_t* codes) {
  return host_margin_rows<double>(p, rows, table_size, params, codes);
}

const char* faulty(int fault, float* out) {
  switch (fault) {
    case 1:
      return launch_faulty<1>(out);
    case 2:
      return launch_faulty<2>(out);
    case 3:
      return launch_faulty<3>(out);
    case 4:
      return launch_faulty<4>(out);
    case 5:
      return launch_faulty<5>(out);
    default:
      return launch_faulty<0>(out);
  }
}

void sin_cos_float32(const float* angle, float* sin, float* cos, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const fm::SinCos<float> result = fm::sin_cos(angle[i]);
    sin[i] = result.sin;
    cos[i] = result.cos;
  }
}

void widen_half(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = fm::widen(fm::Half{from[i]});
}

void narrow_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = fm::narrow<fm::Half>(from[i]).bits;
}

void widen_bfloat16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = fm::widen(fm::BFloat16{from[i]});
}

void narrow_bfloat16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = fm::narrow<fm::BFloat16>(from[i]).bits;
}

}  // extern "C"
#pragma GCC visibility pop
