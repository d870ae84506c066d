// Generalised advantage estimation: a reverse recurrence in each segment of a packed batch.
#include "kernel.h"
#include "scan.h"

namespace FASTRLHF_ISA {
namespace {

// Advantages and returns of one segment [begin, end).
template <class T>
static FASTRLHF_INLINE void gae_plain(const T* rewards, const T* values, T last_value,
                                      T* advantages, T* returns, int64_t begin, int64_t end,
                                      T gamma, const Decay<T>& decay) {
  scan_deltas(rewards, values, last_value, begin, end, gamma, decay,
              [&](int64_t t, Lanes<T> sums, int size) FASTRLHF_LAMBDA {
                store(advantages + t, sums, size);
                store(returns + t, sums + load<Lanes<T>>(values + t, size), size);
              });
}

// One segment [begin, end) with a mask: next means the next token whose mask is set, unless
// zero_gaps makes the others tokens of reward and value 0.
template <class T>
void gae_masked(const T* rewards, const T* values, const bool* mask, T next_value, T* advantages,
                T* returns, int64_t begin, int64_t end, T gamma, T decay, bool zero_gaps) {
  T next_advantage = 0;
  for (int64_t t = end - 1; t >= begin; t--) {
    if (!mask[t]) {
      advantages[t] = returns[t] = 0;
      if (zero_gaps) {
        next_advantage = gamma * next_value + decay * next_advantage;
        next_value = 0;
      }
      continue;
    }
    const T delta = rewards[t] + gamma * next_value - values[t];
    next_advantage = delta + decay * next_advantage;
    next_value = values[t];
    advantages[t] = next_advantage;
    returns[t] = next_advantage + next_value;
  }
}

// A_t = delta_t + gamma lam A_next with delta_t = r_t + gamma V_next - V_t, next being the next
// token of the segment whose mask is set; where the mask is not set, both outputs are 0.
template <class T>
void gae(const T* rewards, const T* values, const int32_t* cu_seqlens, const bool* mask,
         const T* bootstrap, T* advantages, T* returns, int64_t num_segments, double gamma,
         double lam, bool zero_gaps, int64_t num_threads) {
  const T g = static_cast<T>(gamma), gl = static_cast<T>(gamma * lam);
  const Decay<T> decay(gamma * lam);
  on_threads(cu_seqlens[num_segments] > kWorthThreads, num_threads, [=]() FASTRLHF_ONCE {
#pragma omp for schedule(dynamic, 16)
    for (int64_t n = 0; n < num_segments; n++) {
      const int64_t begin = cu_seqlens[n], end = cu_seqlens[n + 1];
      const T last_value = bootstrap ? bootstrap[n] : T(0);
      if (mask)
        gae_masked(rewards, values, mask, last_value, advantages, returns, begin, end, g, gl,
                   zero_gaps);
      else
        gae_plain(rewards, values, last_value, advantages, returns, begin, end, g, decay);
    }
  });
}

FASTRLHF_KERNEL(gae_float32, gae<float>)
FASTRLHF_KERNEL(gae_float64, gae<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
