// Discounted sums of what follows in each segment of a packed batch: a block a segment.
#include "kernel.h"
#include "launch.h"
#include "scan.cuh"

namespace FASTRLHF_ISA {
namespace {

// R_t = r_t + gamma R_next: what advantages are where all values are 0 and lam is 1.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    returns_of_segments(const T* rewards, const int32_t* cu_seqlens, T* returns, int64_t num_tokens,
                        T gamma) {
  const Range range = segment_of(cu_seqlens, blockIdx.x, num_tokens);
  const auto load = [&](int64_t t) -> Token<T> { return {rewards[t], 0, true}; };
  const auto store = [&](int64_t t, T sum, T) { returns[t] = sum; };
  scan_segment<T>(range.begin, range.end, 0, gamma, gamma, load, store);
}

template <class T>
void discounted_returns(const T* rewards, const int32_t* cu_seqlens, T* returns, int64_t num_tokens,
                        int64_t num_segments, double gamma, cudaStream_t stream) {
  FASTRLHF_LAUNCH(returns_of_segments<T>, num_segments, kThreads, stream, rewards, cu_seqlens,
                  returns, num_tokens, static_cast<T>(gamma));
}

FASTRLHF_KERNEL(discounted_returns_float32, discounted_returns<float>)
FASTRLHF_KERNEL(discounted_returns_float64, discounted_returns<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
