// bfloat16 and float16 in memory, float in registers: conversions by integer arithmetic, which every instruction set
// vectorises. Overloads for float and double, which need none, let one kernel serve all four.
#pragma once
#include <stdint.h>
#include <string.h>

namespace FASTRLHF_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float load(float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);  // moves the exponent's bias, denormals included
  const uint32_t special = magnitude | 0x7f800000u;                 // infinity or NaN
  return float_of((magnitude >= 0x0f800000u ? special : finite) | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

inline void store(float* at, float x) { *at = x; }
inline void store(double* at, double x) { *at = x; }

inline void store(bfloat16* at, float x) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  at->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store(float16* at, float x) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;           // NaN or infinity
  const uint32_t small = magnitude < 0x38800000u ? denormal : normal;
  at->bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? large : small) | (bits >> 16 & 0x8000u));
}

}  // namespace
}  // namespace FASTRLHF_ISA
