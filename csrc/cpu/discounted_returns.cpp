// Discounted sums of what follows in each segment of a packed batch.
#include <string.h>

#include "kernel.h"
#include "scan.h"

namespace FASTRLHF_ISA {
namespace {

constexpr int64_t kWorthThreads = 32768;  // tokens; below, waking threads costs more than it saves

// R_t = r_t + gamma R_next.
template <class T>
void discounted_returns(const T* rewards, const int32_t* cu_seqlens, T* returns,
                        int64_t num_segments, double gamma, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) \
    schedule(dynamic, 4) if (cu_seqlens[num_segments] > kWorthThreads)
  for (int64_t first = 0; first < num_segments; first += kGroup) {
    const int num = num_segments - first < kGroup ? static_cast<int>(num_segments - first) : kGroup;
    const int32_t* bounds = cu_seqlens + first;
    const int64_t num_tokens = static_cast<int64_t>(bounds[num]) - bounds[0];
    if (num_tokens == 0) continue;  // the pointers may be null
    memcpy(returns + bounds[0], rewards + bounds[0], num_tokens * sizeof(T));
    scan_group(returns, bounds, num, static_cast<T>(gamma));
  }
}

FASTRLHF_KERNEL(discounted_returns_float32, discounted_returns<float>)
FASTRLHF_KERNEL(discounted_returns_float64, discounted_returns<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
