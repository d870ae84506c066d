// Mean and variance over a mask, and the normalisation by them, which takes one launch where one
// block will do.
#include "kernel.h"
#include "launch.h"
#include "moments.cuh"

namespace FASTRLHF_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kItems = 16;         // elements that are worth a thread
constexpr int64_t kMostParts = 512;    // rows of the workspace
constexpr int64_t kMostBlocks = 1024;  // of those that whiten, as each merges all rows
constexpr int kThreadsAlone = 1024;    // of a block that gathers and whitens

int64_t blocks_for(int64_t n, int64_t most) {
  const int64_t blocks = (n + kThreads * kItems - 1) / (kThreads * kItems);
  return blocks < most ? blocks : most;
}

// Of what this block finds in x, of every element that the threads of the grid come by; every
// thread gets the result.
template <class T>
__device__ Moments gathered(const T* x, const bool* mask, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  Gatherer gatherer;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    if (!mask || mask[i]) gatherer.add(x[i]);
  return merged_over_block(gatherer.moments());
}

// y = (x - mean) / sqrt(variance + eps), plus the mean unless `center`; 0 where the mask is not
// set.
template <class T>
__device__ void write_white(const T* x, const bool* mask, const Moments& moments, T* y, int64_t n,
                            bool center, double eps) {
  const double scale = 1 / sqrt(moments.squares / (moments.n > 0 ? moments.n : 1) + eps);
  const double offset = center ? 0 : moments.mean;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    y[i] = !mask || mask[i] ? static_cast<T>((x[i] - moments.mean) * scale + offset) : 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_parts(const T* x, const bool* mask, Moments* parts, int64_t n) {
  const Moments total = gathered(x, mask, n);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    merge_parts(const Moments* parts, int num_parts, Moments* moments) {
  const Moments total = merged_rows(parts, num_parts);
  if (threadIdx.x == 0) *moments = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    whiten(const T* x, const bool* mask, const Moments* parts, int num_parts, T* y, int64_t n,
           bool center, double eps) {
  write_white(x, mask, merged_rows(parts, num_parts), y, n, center, eps);
}

// One block.
template <class T>
__global__ void __launch_bounds__(kThreadsAlone)
    whiten_alone(const T* x, const bool* mask, T* y, int64_t n, bool center, double eps) {
  write_white(x, mask, gathered(x, mask, n), y, n, center, eps);
}

// parts: a workspace of kMostParts rows
template <class T>
void masked_moments(const T* x, const bool* mask, double* parts, double* moments, int64_t n,
                    cudaStream_t stream) {
  const int64_t num_parts = blocks_for(n, kMostParts);
  Moments* rows = reinterpret_cast<Moments*>(parts);
  FASTRLHF_LAUNCH(gather_parts<T>, num_parts, kThreads, stream, x, mask, rows, n);
  FASTRLHF_LAUNCH(merge_parts, 1, kThreads, stream, rows, static_cast<int>(num_parts),
                  reinterpret_cast<Moments*>(moments));
}

// moments: those to whiten by, or null for those of x
template <class T>
void masked_whiten(const T* x, const bool* mask, const double* moments, double* parts, T* y,
                   int64_t n, bool center, double eps, cudaStream_t stream) {
  if (!moments && n <= kThreadsAlone * kItems) {
    FASTRLHF_LAUNCH(whiten_alone<T>, n > 0, kThreadsAlone, stream, x, mask, y, n, center, eps);
    return;
  }
  const int64_t num_parts = moments ? 1 : blocks_for(n, kMostParts);
  Moments* rows = reinterpret_cast<Moments*>(parts);
  if (!moments) FASTRLHF_LAUNCH(gather_parts<T>, num_parts, kThreads, stream, x, mask, rows, n);
  const Moments* found = moments ? reinterpret_cast<const Moments*>(moments) : rows;
  FASTRLHF_LAUNCH(whiten<T>, blocks_for(n, kMostBlocks), kThreads, stream, x, mask, found,
                  static_cast<int>(num_parts), y, n, center, eps);
}

FASTRLHF_KERNEL(masked_moments_float32, masked_moments<float>)
FASTRLHF_KERNEL(masked_moments_float64, masked_moments<double>)
FASTRLHF_KERNEL(masked_whiten_float32, masked_whiten<float>)
FASTRLHF_KERNEL(masked_whiten_float64, masked_whiten<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
