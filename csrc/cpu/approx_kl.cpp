// Estimators of the KL divergence from the log-probs of sampled tokens.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// With r = ref - logprob: k1 = -r, k2 = r^2 / 2, k3 = e^r - 1 - r.
template <class T>
void approx_kl(const T* logprobs, const T* ref_logprobs, T* out, int64_t n, int64_t estimator,
               int64_t num_threads) {
  typedef Lanes<T> V;
  for_elements<V>(n, num_threads, [=](int64_t i, int size) FASTRLHF_LAMBDA {
    const V r = load<V>(ref_logprobs + i, size) - load<V>(logprobs + i, size);
    if (estimator == 1)
      store(out + i, -r, size);
    else if (estimator == 2)
      store(out + i, r * r / 2, size);
    else
      store(out + i, exp_minus_linear(r, exp_lanes(r)), size);
  });
}

FASTRLHF_KERNEL(approx_kl_float32, approx_kl<float>)
FASTRLHF_KERNEL(approx_kl_float64, approx_kl<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
