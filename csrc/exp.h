// exp for arguments that are not positive, in a form that compilers vectorise.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace FASTRLHF_ISA {
namespace {

// Within 2 ulp for x <= 0; exactly 0 below -87.3 (and for -inf), NaN for NaN.
inline float exp_nonpositive(float x) {
  const float magic = 12582912.f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const float clipped = x < -87.3f ? -87.3f : x;
  const float rounded = clipped * 1.44269504088896341f + magic;
  int32_t bits;
  memcpy(&bits, &rounded, 4);
  const float n = rounded - magic;
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const uint32_t power_bits = (static_cast<uint32_t>(bits) - 0x4b400000u + 127u) << 23;
  float power;  // 2^n, multiplied in rather than added to the exponent, so that NaN stays NaN
  memcpy(&power, &power_bits, 4);
  return x < -87.3f ? 0.f : y * power;
}

inline double exp_nonpositive(double x) { return exp(x); }

}  // namespace
}  // namespace FASTRLHF_ISA
