// Estimators of the KL divergence from the log-probs of sampled tokens.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// With r = ref - logprob: k1 = -r, k2 = r^2 / 2, k3 = e^r - 1 - r.
template <class T>
void approx_kl(const T* logprobs, const T* ref_logprobs, T* out, int64_t n, int64_t estimator,
               int64_t num_threads) {
  for_elements(n, num_threads, [&](int64_t i, int size, int64_t) FASTRLHF_LAMBDA {
    const Vec r = load(ref_logprobs + i, size) - load(logprobs + i, size);
    store(out + i,
          estimator == 1   ? -r
          : estimator == 2 ? 0.5 * r * r
                           : exp_minus_linear(r, exp_lanes(r)),
          size);
  });
}

FASTRLHF_KERNEL(approx_kl_float32, approx_kl<float>)
FASTRLHF_KERNEL(approx_kl_float64, approx_kl<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
