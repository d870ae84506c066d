// Rotary position embedding, and its transpose, which is its gradient.
#include "half.h"
#include "kernel.h"
#include "numeric.h"
#include "rows.h"

namespace FASTRLHF_ISA {
namespace {

// With halves x, y of a head: x cos - y sin, y cos + x sin; transposed: x cos + y sin, y cos - x sin,
// where the sine is that of the half that it comes from.
template <class In>
static FASTRLHF_INLINE void turn(const In* x, const In* cos, const In* sin, In* to, int64_t half,
                                 bool transposed) {
  typedef Lanes<Wide<In>> V;
  for_lanes<V>(0, half, [=](int64_t d, int size) FASTRLHF_LAMBDA {
    const V first = wide_lanes(x + d, size), second = wide_lanes(x + half + d, size);
    const V s = wide_lanes(sin + d, size), t = wide_lanes(sin + half + d, size);
    const V a = second * (transposed ? t : -s), b = first * (transposed ? -s : t);
    store_wide(to + d, first * wide_lanes(cos + d, size) + a, size);
    store_wide(to + half + d, second * wide_lanes(cos + half + d, size) + b, size);
  });
}

// states, out (T, H, K); cos, sin (T, K)
template <class In>
void rotary(const In* states, const In* cos, const In* sin, In* out, int64_t num_tokens,
            int64_t num_heads, int64_t width, int64_t transposed, int64_t num_threads) {
  const bool worth = num_tokens * num_heads * width > kWorthThreads;
  on_threads(worth, num_threads, [=]() FASTRLHF_ONCE {
#pragma omp for
    for (int64_t t = 0; t < num_tokens; t++)
      for (int64_t h = 0; h < num_heads; h++) {
        const int64_t at = (t * num_heads + h) * width;
        turn(states + at, cos + t * width, sin + t * width, out + at, width / 2, transposed != 0);
      }
  });
}

FASTRLHF_KERNEL(rotary_float32, rotary<float>)
FASTRLHF_KERNEL(rotary_float64, rotary<double>)
FASTRLHF_KERNEL(rotary_bfloat16, rotary<bfloat16>)
FASTRLHF_KERNEL(rotary_float16, rotary<float16>)

}  // namespace
}  // namespace FASTRLHF_ISA
