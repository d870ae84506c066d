// Generalised advantage estimation: a reverse recurrence in each segment of a packed batch.
#include "kernel.h"

namespace FASTRLHF_ISA {
namespace {

// A_t = delta_t + gamma lam A_next with delta_t = r_t + gamma V_next - V_t, next being the next
// token of the segment whose mask is set; where the mask is not set, both outputs are 0.
template <class T>
void gae(const T* rewards, const T* values, const int32_t* cu_seqlens, const bool* mask, const T* bootstrap,
         T* advantages, T* returns, int64_t num_segments, double gamma, double lam, int64_t num_threads) {
  const T g = static_cast<T>(gamma), gl = static_cast<T>(gamma * lam);
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 16)
  for (int64_t n = 0; n < num_segments; n++) {
    T next_value = bootstrap ? bootstrap[n] : T(0), next_advantage = 0;
    for (int64_t t = static_cast<int64_t>(cu_seqlens[n + 1]) - 1; t >= cu_seqlens[n]; t--) {
      if (mask && !mask[t]) {
        advantages[t] = returns[t] = 0;
        continue;
      }
      const T delta = rewards[t] + g * next_value - values[t];
      next_advantage = delta + gl * next_advantage;
      next_value = values[t];
      advantages[t] = next_advantage;
      returns[t] = next_advantage + next_value;
    }
  }
}

FASTRLHF_KERNEL(gae_float32, gae<float>)
FASTRLHF_KERNEL(gae_float64, gae<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
