// Scores of the responses to one prompt against each other.
#include <float.h>

#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// A = (s - mean) / (std + eps) for kind 1, s - mean for 2, s - mean of the others for 3. The mean
// is taken of differences to the first score, so that it is exact where all are equal. For kind 1 a
// std of at most 8 roundings of the mean is none, and A = 0.
template <class T>
void group_advantages(const T* scores, const int32_t* cu_groups, T* advantages, int64_t num_groups,
                      int64_t kind, double eps, int64_t num_threads) {
  const double rounding = 8 * (sizeof(T) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON);
  on_threads(cu_groups[num_groups] > kWorthThreads, num_threads, [=]() FASTRLHF_ONCE {
#pragma omp for
    for (int64_t g = 0; g < num_groups; g++) {
      const int64_t begin = cu_groups[g], end = cu_groups[g + 1];
      if (begin == end) continue;
      const double n = static_cast<double>(end - begin), others = n > 1 ? n - 1 : 1,
                   first = scores[begin];
      const auto sum = [&](double origin, bool squared) FASTRLHF_LAMBDA {
        Vec total = {};
        for_lanes(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
          const Vec d = load(scores + i, size) - origin;
          total += select(load_mask(nullptr, i, size), squared ? d * d : d, all(0));
        });
        return sum_lanes(total);
      };
      const double mean = first + sum(first, false) / n;
      const double deviation = kind == 1 ? sqrt(sum(mean, true) / others) : 0;
      const double scale = kind == 2                            ? 1
                           : kind == 3                          ? n / others
                           : deviation <= rounding * fabs(mean) ? 0
                                                                : 1 / (deviation + eps);
      for_lanes(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
        store(advantages + i, (load(scores + i, size) - mean) * scale, size);
      });
    }
  });
}

FASTRLHF_KERNEL(group_advantages_float32, group_advantages<float>)
FASTRLHF_KERNEL(group_advantages_float64, group_advantages<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
