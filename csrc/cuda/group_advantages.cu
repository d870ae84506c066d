// Scores of the responses to one prompt against each other: a warp a group.
#include <float.h>

#include "kernel.h"
#include "launch.h"

namespace FASTRLHF_ISA {
namespace {

constexpr int kWarps = 4;

__device__ inline double warp_sum(double x) {
  for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

// A = (s - mean) / (std + eps) for kind 1, s - mean for 2, s - mean of the others for 3. The mean
// is taken of differences to the first score, so that it is exact where all are equal. For kind 1 a
// std of at most 8 roundings of the mean is none, and A = 0.
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    advantages_of_groups(const T* scores, const int32_t* cu_groups, T* advantages,
                         int64_t num_scores, int64_t num_groups, int kind, double eps) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (g >= num_groups) return;
  const int lane = threadIdx.x % 32;
  const int64_t begin = cu_groups[g] < 0 ? 0 : cu_groups[g];
  const int64_t end = cu_groups[g + 1] < num_scores ? cu_groups[g + 1] : num_scores;
  if (begin >= end) return;
  const double n = static_cast<double>(end - begin), others = n > 1 ? n - 1 : 1,
               first = scores[begin];
  double sum = 0, squares = 0;
  for (int64_t i = begin + lane; i < end; i += 32) sum += scores[i] - first;
  const double mean = first + warp_sum(sum) / n;
  for (int64_t i = begin + lane; i < end; i += 32)
    squares += (scores[i] - mean) * (scores[i] - mean);
  squares = warp_sum(squares);
  const double rounding = 8 * (sizeof(T) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON);
  const double deviation = sqrt(squares / others);
  const double scale = kind == 2                            ? 1
                       : kind == 3                          ? n / others
                       : deviation <= rounding * fabs(mean) ? 0
                                                            : 1 / (deviation + eps);
  for (int64_t i = begin + lane; i < end; i += 32)
    advantages[i] = static_cast<T>((scores[i] - mean) * scale);
}

template <class T>
void group_advantages(const T* scores, const int32_t* cu_groups, T* advantages, int64_t num_scores,
                      int64_t num_groups, int64_t kind, double eps, cudaStream_t stream) {
  FASTRLHF_LAUNCH(advantages_of_groups<T>, (num_groups + kWarps - 1) / kWarps, 32 * kWarps, stream,
                  scores, cu_groups, advantages, num_scores, num_groups, static_cast<int>(kind),
                  eps);
}

FASTRLHF_KERNEL(group_advantages_float32, group_advantages<float>)
FASTRLHF_KERNEL(group_advantages_float64, group_advantages<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
