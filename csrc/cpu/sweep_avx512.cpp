// Compiled with AVX-512 F, DQ, BW and VL: 12 x 2 of 32 registers hold sums.
#if defined(__x86_64__)
#define FM_VECTOR_BYTES 64
#define FM_ROWS 12
#define FM_COLUMNS 8
#include "sweep_kernels.h"

namespace fastmargin::cpu {

template <>
Kernels<float> avx512_kernels<float>() {
  return kernels<float>();
}
template <>
Kernels<double> avx512_kernels<double>() {
  return kernels<double>();
}

}  // namespace fastmargin::cpu
#endif
