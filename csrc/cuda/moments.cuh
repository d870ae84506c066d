// Count, mean and sum of squared differences to the mean, gathered by blocks and merged in an order
// that does not depend on timing. All in double: a sum of squares in less loses what a large mean
// hides.
#pragma once
#include <stdint.h>
#include <string.h>

namespace FASTRLHF_ISA {
namespace {

struct Moments {
  double n, mean, squares;
};

__device__ inline Moments merged(const Moments& a, const Moments& b) {
  const double n = a.n + b.n, d = b.mean - a.mean;
  if (n == 0) return {};
  return {n, a.mean + d * (b.n / n), a.squares + b.squares + d * d * (a.n * b.n / n)};
}

// Adds up differences to the first element, which is of the mean's size where the mean is large.
struct Gatherer {
  double pivot = 0, sum = 0, squares = 0;
  int64_t n = 0;
  __device__ void add(double x) {
    if (n++ == 0) pivot = x;
    const double d = x - pivot;
    sum += d;
    squares += d * d;
  }
  __device__ Moments moments() const {
    if (n == 0) return {};
    const double mean = sum / n, rest = squares - sum * mean;
    return {static_cast<double>(n), pivot + mean, rest < 0 ? 0 : rest};
  }
};

// `own` of all threads of a block merged; every thread gets the result. S is a struct of doubles
// with a merged().
template <class S>
__device__ S merged_over_block(S own) {
  constexpr int num_doubles = sizeof(S) / sizeof(double);
  __shared__ S of_warps[32];
  const int lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  for (int by = 16; by; by /= 2) {
    double numbers[num_doubles];
    memcpy(numbers, &own, sizeof own);
#pragma unroll
    for (int i = 0; i < num_doubles; i++)
      numbers[i] = __shfl_down_sync(0xffffffffu, numbers[i], by);
    S other;
    memcpy(&other, numbers, sizeof other);
    // means something in the lanes below `by` alone, and in the end in lane 0
    own = merged(own, other);
  }
  __syncthreads();  // an earlier call may still be read
  if (lane == 0) of_warps[threadIdx.x / 32] = own;
  __syncthreads();
  S total = of_warps[0];
  for (int w = 1; w < num_warps; w++) total = merged(total, of_warps[w]);
  return total;
}

// The rows that the blocks of an earlier launch left, merged by each block for itself.
template <class S>
__device__ S merged_rows(const S* rows, int num_rows) {
  S own = {};
  for (int i = threadIdx.x; i < num_rows; i += blockDim.x) own = merged(own, rows[i]);
  return merged_over_block(own);
}

}  // namespace
}  // namespace FASTRLHF_ISA
