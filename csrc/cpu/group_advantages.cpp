// Scores of the responses to one prompt against each other.
#include <math.h>

#include "kernel.h"

namespace FASTRLHF_ISA {
namespace {

// A = (s - mean) / (std + eps) for kind 1, s - mean for 2, s - mean of the others for 3. The mean
// is taken of differences to the first score, so that it is exact where all are equal.
template <class T>
void group_advantages(const T* scores, const int32_t* cu_groups, T* advantages, int64_t num_groups,
                      int64_t kind, double eps) {
  for (int64_t g = 0; g < num_groups; g++) {
    const int64_t begin = cu_groups[g], end = cu_groups[g + 1];
    if (begin == end) continue;
    const double n = static_cast<double>(end - begin), others = n > 1 ? n - 1 : 1,
                 first = scores[begin];
    double sum = 0, squares = 0;
    for (int64_t i = begin; i < end; i++) sum += scores[i] - first;
    const double mean = first + sum / n;
    for (int64_t i = begin; i < end; i++) squares += (scores[i] - mean) * (scores[i] - mean);
    const double scale = kind == 1   ? 1 / (sqrt(squares / others) + eps)
                         : kind == 2 ? 1
                                     : n / others;
    for (int64_t i = begin; i < end; i++)
      advantages[i] = static_cast<T>((scores[i] - mean) * scale);
  }
}

FASTRLHF_KERNEL(group_advantages_float32, group_advantages<float>)
FASTRLHF_KERNEL(group_advantages_float64, group_advantages<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
