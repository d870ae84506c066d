// exp for arguments that are not positive, in a form that compilers vectorise.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// Within 2 ulp for x <= 0; exactly 0 below -87.3 (and for -inf), NaN for NaN. X is float or a vector
// of them, I unsigned integers as wide.
template <class X, class I>
static FASTRLHF_INLINE X exp_of_floats(X x) {
  const X magic = all<X>(12582912);  // adding 1.5 * 2^23 rounds to the nearest integer
  const X lowest = all<X>(-87.3f);
  const auto kept = !(x < lowest);
  const X clipped = select<X>(kept, x, lowest);
  const X rounded = clipped * 1.44269504088896341f + magic;
  I bits;
  memcpy(&bits, &rounded, sizeof bits);
  const X n = rounded - magic;
  const X r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  X y = all<X>(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const I power_bits = (bits - 0x4b400000u + 127u) << 23;
  X power;  // 2^n, multiplied in rather than added to the exponent, so that NaN stays NaN
  memcpy(&power, &power_bits, sizeof power);
  return select<X>(kept, y * power, all<X>(0));
}

inline float exp_nonpositive(float x) { return exp_of_floats<float, uint32_t>(x); }
inline double exp_nonpositive(double x) { return exp(x); }

template <class V>
static FASTRLHF_INLINE V exp_nonpositive(V x) {
  if constexpr (sizeof(x[0]) == 8)
    return exp_lanes(x);
  else
    return exp_of_floats<V, typename VectorOf<uint32_t, kLanesOf<V>>::Type>(x);
}

}  // namespace
}  // namespace FASTRLHF_ISA
