// Number types and the few functions of them that host and device code share.
//
// Nothing here includes torch, and cuda_*.h only under nvcc, so that g++ tests the same lines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FM_HOST_DEVICE inline
#endif

namespace fastmargin {

// Storage of the two 16-bit types. They are read and written, never computed with.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a type is computed in: double stays, all else becomes float.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

namespace detail {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  // subnormal: a multiple of 2^-24, exact in fp32
  const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  return float_of(sign | bits_of(value));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
  if (magnitude < 0x38800000u) {
    // below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded to even, in the low bits
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
  }
  // round to even at bit 13; a carry into the exponent is right, up to infinity
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace detail

FM_HOST_DEVICE float widen(float value) { return value; }
FM_HOST_DEVICE double widen(double value) { return value; }

FM_HOST_DEVICE float widen(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return detail::half_to_float(value.bits);
#endif
}

FM_HOST_DEVICE float widen(BFloat16 value) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return detail::float_of(static_cast<uint32_t>(value.bits) << 16);
#endif
}

// To storage, rounded to nearest even.
template <typename T>
FM_HOST_DEVICE T narrow(Compute<T> value) {
  return value;
}

template <>
FM_HOST_DEVICE Half narrow<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  return Half{detail::float_to_half(value)};
#endif
}

template <>
FM_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return BFloat16{detail::float_to_bfloat16(value)};
#endif
}

// Unlike fmin and fmax this hands a NaN on, as torch.clamp does.
template <typename T>
FM_HOST_DEVICE T clamp(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

// sqrt(machine epsilon): the smallest sine that a division by sin(theta) sees.
template <typename T>
struct SineFloor;
template <>
struct SineFloor<float> {
  static constexpr float value = 3.4526698300124393e-4f;
};
template <>
struct SineFloor<double> {
  static constexpr double value = 1.4901161193847656e-8;
};

template <typename T>
struct SinCos {
  T sin, cos;
};

FM_HOST_DEVICE SinCos<double> sin_cos(double angle) { return {std::sin(angle), std::cos(angle)}; }

// Margins are angles of a few radians. CUDA's sinf keeps a stack frame for the reduction of huge
// arguments; this reduction by three parts of pi/2 (each product exact for |angle| < 1e5) needs
// none, and host and device run the same polynomials. Error below 1.5 ulp of 1.
FM_HOST_DEVICE SinCos<float> sin_cos(float angle) {
  const float turns = std::rint(angle * 0.636619772f);
  float r = angle - turns * 1.5703125f;
  r = r - turns * 4.837512969970703e-4f;
  r = r - turns * 7.549789954891882e-8f;
  const float z = r * r;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  // the quadrant stays a float: converting a NaN to an integer is undefined
  const float quadrant = turns - 4.0f * std::floor(0.25f * turns);
  const bool odd = quadrant == 1.0f || quadrant == 3.0f;
  const float sine = odd ? c : s, cosine = odd ? s : c;
  return {quadrant >= 2.0f ? -sine : sine, quadrant == 1.0f || quadrant == 2.0f ? -cosine : cosine};
}

}  // namespace fastmargin
