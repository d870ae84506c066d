// silu(gate) up and its gradient in one pass.
#include "exp.h"
#include "half.h"
#include "kernel.h"
#include "numeric.h"
#include "rows.h"

namespace FASTRLHF_ISA {
namespace {

// 1 / (1 + e^-x), and 1 minus that without cancellation
template <class V>
struct Sigmoid {
  V value, rest;
  explicit FASTRLHF_INLINE Sigmoid(V x) {
    const V e = exp_nonpositive(select(x < 0, x, -x)), share = 1 / (1 + e), other = e * share;
    value = select(x < 0, other, share);
    rest = select(x < 0, share, other);
  }
};

template <class In>
void silu_mul(const In* gate, const In* up, In* out, int64_t n, int64_t num_threads) {
  typedef Lanes<Wide<In>> V;
  for_elements<V>(n, num_threads, [=](int64_t i, int size) FASTRLHF_LAMBDA {
    const V x = wide_lanes(gate + i, size);
    store_wide(out + i, x * Sigmoid<V>(x).value * wide_lanes(up + i, size), size);
  });
}

// d silu / dx = s + x s (1 - s)
template <class In>
void silu_mul_backward(const In* grad, const In* gate, const In* up, In* of_gate, In* of_up,
                       int64_t n, int64_t num_threads) {
  typedef Lanes<Wide<In>> V;
  for_elements<V>(n, num_threads, [=](int64_t i, int size) FASTRLHF_LAMBDA {
    const V x = wide_lanes(gate + i, size), g = wide_lanes(grad + i, size);
    const Sigmoid<V> s(x);
    const V of_x = g * wide_lanes(up + i, size) * (s.value + x * s.value * s.rest);
    store_wide(of_gate + i, of_x, size);
    store_wide(of_up + i, g * (x * s.value), size);
  });
}

FASTRLHF_KERNEL(silu_mul_float32, silu_mul<float>)
FASTRLHF_KERNEL(silu_mul_float64, silu_mul<double>)
FASTRLHF_KERNEL(silu_mul_bfloat16, silu_mul<bfloat16>)
FASTRLHF_KERNEL(silu_mul_float16, silu_mul<float16>)
FASTRLHF_KERNEL(silu_mul_backward_float32, silu_mul_backward<float>)
FASTRLHF_KERNEL(silu_mul_backward_float64, silu_mul_backward<double>)
FASTRLHF_KERNEL(silu_mul_backward_bfloat16, silu_mul_backward<bfloat16>)
FASTRLHF_KERNEL(silu_mul_backward_float16, silu_mul_backward<float16>)

}  // namespace
}  // namespace FASTRLHF_ISA
