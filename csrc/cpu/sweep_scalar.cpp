// For every machine: vectors of 16 bytes, which the compiler maps to what the architecture always
// has (SSE2, NEON) or to scalar code.
#define FM_VECTOR_BYTES 16
#define FM_ROWS 6
#define FM_COLUMNS 4
#include "sweep_kernels.h"

namespace fastmargin::cpu {

template <>
Kernels<float> scalar_kernels<float>() {
  return kernels<float>();
}
template <>
Kernels<double> scalar_kernels<double>() {
  return kernels<double>();
}

}  // namespace fastmargin::cpu
