// Vectors of FM_VECTOR_BYTES in the compilers' own notation (GCC and Clang), their exp, and the
// 16-bit types. Included once per instruction set, so everything sits in an unnamed namespace: an
// inline function with external linkage, numeric.h's or the standard library's, could reach an
// older machine in the AVX-512 version that the linker kept.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastmargin::cpu {
namespace {

#define FM_INLINE [[gnu::always_inline]] inline

template <typename T>
struct Simd {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int64_t kWidth = FM_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));
  typedef T Vec __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef Int IntVec __attribute__((vector_size(FM_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename Simd<T>::Vec;

// A panel is two vectors wide: enough accumulators to hide the latency of a multiply-add.
template <typename T>
constexpr int64_t kLanes = 2 * Simd<T>::kWidth;

template <typename T>
FM_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const Vec<T>*>(from);
}

template <typename T>
FM_INLINE void store(T* to, Vec<T> value) {
  *reinterpret_cast<Vec<T>*>(to) = value;
}

template <typename T>
FM_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // not a sum, which would have to turn -0 into 0
}

template <typename T>
FM_INLINE T horizontal_sum(Vec<T> v) {
  T sum = 0;
  for (int64_t i = 0; i < Simd<T>::kWidth; ++i) sum += v[i];
  return sum;
}

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  // below, 0 instead of a subnormal; above, no infinity
  static constexpr float kLow = -87.33654f, kHigh = 88.0f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23, kBias = 127;
  // exp(r) on |r| <= ln(2) / 2, relative error 2e-8 (Cephes expf), highest power first
  static constexpr float kPoly[] = {1.9875691500e-4f,
                                    1.3981999507e-3f,
                                    8.3334519073e-3f,
                                    4.1665795894e-2f,
                                    1.6666665459e-1f,
                                    5.0000001201e-1f,
                                    1.0f,
                                    1.0f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLow = -708.0, kHigh = 709.0;
  static constexpr double kLn2High = 6.93147180369123816490e-1,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  // 1 / n!, n = 13 to 0: relative error 4e-18
  static constexpr double kPoly[] = {1.0 / 6227020800,
                                     1.0 / 479001600,
                                     1.0 / 39916800,
                                     1.0 / 3628800,
                                     1.0 / 362880,
                                     1.0 / 40320,
                                     1.0 / 5040,
                                     1.0 / 720,
                                     1.0 / 120,
                                     1.0 / 24,
                                     1.0 / 6,
                                     1.0 / 2,
                                     1.0,
                                     1.0};
};

// exp(x) to about one unit in the last place; 0 for x = -inf, NaN for NaN.
template <typename T>
FM_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  using IntVec = typename Simd<T>::IntVec;
  const Vec<T> low = broadcast<T>(C::kLow), high = broadcast<T>(C::kHigh);
  const auto underflow = x < low;
  x = underflow ? low : x;
  x = x > high ? high : x;
  const Vec<T> shifted = x * T(1.44269504088896340736) + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  Vec<T> p = broadcast<T>(C::kPoly[0]);
#pragma GCC unroll 16
  for (int i = 1; i < static_cast<int>(sizeof(C::kPoly) / sizeof(T)); ++i) p = p * r + C::kPoly[i];
  // the low bits of `shifted` hold n
  const IntVec power = __builtin_bit_cast(IntVec, shifted) + C::kBias;
  const IntVec two_to_n = power << C::kMantissa;
  const Vec<T> result = p * __builtin_bit_cast(Vec<T>, two_to_n);
  return underflow ? Vec<T>{} : result;
}

// ---- 16-bit types, without branches so that the loops over them become vectors ------------------

struct Half16 {
  uint16_t bits;
};
struct Brain16 {
  uint16_t bits;
};

FM_INLINE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
FM_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

FM_INLINE float widen(float value) { return value; }
FM_INLINE double widen(double value) { return value; }
FM_INLINE float widen(Brain16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
FM_INLINE float widen(Half16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu);
  // a normal number moves its exponent, a subnormal one is a multiple of 2^-24
  const uint32_t extra = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + extra;
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x0400u ? small : normal));
}

FM_INLINE void narrow(double value, float* to) { *to = static_cast<float>(value); }
FM_INLINE void narrow(double value, double* to) { *to = value; }
FM_INLINE void narrow(float value, Brain16* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? (bits >> 16 | 0x40u) : rounded);
}
FM_INLINE void narrow(float value, Half16* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  // below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded to even, in the low bits
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = half > 0x7c00u || magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to->bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

}  // namespace
}  // namespace fastmargin::cpu
