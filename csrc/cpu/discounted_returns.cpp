// Discounted sums of what follows in each segment of a packed batch.
#include "kernel.h"
#include "scan.h"

namespace FASTRLHF_ISA {
namespace {

// R_t = r_t + gamma R_next.
template <class T>
void discounted_returns(const T* rewards, const int32_t* cu_seqlens, T* returns,
                        int64_t num_segments, double gamma, int64_t num_threads) {
  const Decay<T> decay(gamma);
  on_threads(cu_seqlens[num_segments] > kWorthThreads, num_threads, [=]() FASTRLHF_ONCE {
#pragma omp for schedule(dynamic, 16)
    for (int64_t n = 0; n < num_segments; n++)
      scan_segment<T>(
          cu_seqlens[n], cu_seqlens[n + 1], decay,
          [&](int64_t t, int size) FASTRLHF_LAMBDA { return load<Lanes<T>>(rewards + t, size); },
          [&](int64_t t, Lanes<T> sums, int size)
              FASTRLHF_LAMBDA { store(returns + t, sums, size); });
  });
}

FASTRLHF_KERNEL(discounted_returns_float32, discounted_returns<float>)
FASTRLHF_KERNEL(discounted_returns_float64, discounted_returns<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
