// Mean and variance over a mask, and the normalisation by them.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// moments = (n, mean, sum of (x - mean)^2): two passes, as a sum of squares loses what a large mean
// hides.
template <class T>
void masked_moments(const T* x, const bool* mask, double* moments, int64_t n, int64_t num_threads) {
  const double kept = static_cast<double>(count(mask, n));
  double mean = 0;
  for (int order = 1; order <= 2; order++) {
    Slots sums(0);
    for_pieces(n, num_threads,
               [=, &sums](int64_t begin, int64_t end, int64_t chunk) FASTRLHF_LAMBDA {
                 Vec sum = {};
                 for_lanes(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
                   const Vec d = load(x + i, size) - mean;
                   sum += select(load_mask(mask, i, size), order == 1 ? d : d * d, all(0));
                 });
                 sums.of[chunk] += sum_lanes(sum);
               });
    if (order == 1)
      mean = kept ? sums.sum() / kept : 0.0;
    else
      moments[2] = sums.sum();
  }
  moments[0] = kept;
  moments[1] = mean;
}

// y = (x - mean) / sqrt(variance + eps), plus the mean unless `center`; 0 where the mask is not
// set. Without moments they are those of x.
template <class T>
void masked_whiten(const T* x, const bool* mask, const double* moments, T* y, int64_t n,
                   bool center, double eps, int64_t num_threads) {
  double own[3];
  if (!moments) {
    masked_moments(x, mask, own, n, num_threads);
    moments = own;
  }
  const double mean = moments[1],
               scale = 1 / sqrt(moments[2] / (moments[0] > 0 ? moments[0] : 1.0) + eps);
  const double offset = center ? 0.0 : mean;
  for_elements(n, num_threads, [=](int64_t i, int size) FASTRLHF_LAMBDA {
    const Vec white = (load(x + i, size) - mean) * scale + offset;
    store(y + i, select(load_mask(mask, i, size), white, all(0)), size);
  });
}

FASTRLHF_KERNEL(masked_moments_float32, masked_moments<float>)
FASTRLHF_KERNEL(masked_moments_float64, masked_moments<double>)
FASTRLHF_KERNEL(masked_whiten_float32, masked_whiten<float>)
FASTRLHF_KERNEL(masked_whiten_float64, masked_whiten<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
