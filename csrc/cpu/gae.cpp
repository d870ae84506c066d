// Generalised advantage estimation: a reverse recurrence in each segment of a packed batch.
#include "kernel.h"
#include "scan.h"

namespace FASTRLHF_ISA {
namespace {

constexpr int64_t kWorthThreads = 32768;  // tokens; below, waking threads costs more than it saves

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

// `num` <= kGroup segments without a mask: the deltas, the recurrence and the returns, each in a
// loop of its own.
template <class T>
void gae_group(const T* rewards, const T* values, const int32_t* cu_seqlens, const T* bootstrap,
               T* __restrict__ advantages, T* __restrict__ returns, int num, T gamma, T decay) {
  const int64_t begin = cu_seqlens[0], end = cu_seqlens[num];
  for (int64_t t = begin; t < end - 1; t++)
    advantages[t] = rewards[t] + gamma * values[t + 1] - values[t];
  for (int j = 0; j < num; j++)
    if (cu_seqlens[j] < cu_seqlens[j + 1]) {
      const int64_t t = static_cast<int64_t>(cu_seqlens[j + 1]) - 1;
      advantages[t] = rewards[t] + gamma * (bootstrap ? bootstrap[j] : T(0)) - values[t];
    }
  scan_group(advantages, cu_seqlens, num, decay);
  for (int64_t t = begin; t < end; t++) returns[t] = advantages[t] + values[t];
}

// A_t = delta_t + gamma lam A_next with delta_t = r_t + gamma V_next - V_t, next being the next
// token of the segment whose mask is set; where the mask is not set, both outputs are 0.
template <class T>
void gae(const T* rewards, const T* values, const int32_t* cu_seqlens, const bool* mask,
         const T* bootstrap, T* advantages, T* returns, int64_t num_segments, double gamma,
         double lam, bool zero_gaps, int64_t num_threads) {
  const T g = static_cast<T>(gamma), gl = static_cast<T>(gamma * lam);
#pragma omp parallel for num_threads(num_threads) \
    schedule(dynamic, 4) if (cu_seqlens[num_segments] > kWorthThreads)
  for (int64_t first = 0; first < num_segments; first += kGroup) {
    const int num = num_segments - first < kGroup ? static_cast<int>(num_segments - first) : kGroup;
    if (mask) {
      for (int64_t n = first; n < first + num; n++)
        gae_masked(rewards, values, mask, bootstrap ? bootstrap[n] : T(0), advantages, returns,
                   cu_seqlens[n], cu_seqlens[n + 1], g, gl, zero_gaps);
    } else {
      gae_group(rewards, values, cu_seqlens + first, bootstrap ? bootstrap + first : nullptr,
                advantages, returns, num, g, gl);
    }
  }
}

FASTRLHF_KERNEL(gae_float32, gae<float>)
FASTRLHF_KERNEL(gae_float64, gae<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
