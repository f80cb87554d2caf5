// Compiled with AVX2 and FMA: 6 x 2 of 16 registers hold sums.
#if defined(__x86_64__)
#define FM_VECTOR_BYTES 32
#define FM_ROWS 6
#define FM_COLUMNS 4
#include "sweep_kernels.h"

namespace fastmargin::cpu {

template <>
Kernels<float> avx2_kernels<float>() {
  return kernels<float>();
}
template <>
Kernels<double> avx2_kernels<double>() {
  return kernels<double>();
}

}  // namespace fastmargin::cpu
#endif
