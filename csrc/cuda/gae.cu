// Generalised advantage estimation over a packed batch: a block a segment.
#include "kernel.h"
#include "launch.h"
#include "scan.cuh"

namespace FASTRLHF_ISA {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gae_segments(const T* rewards, const T* values, const int32_t* cu_seqlens, const bool* mask,
                 const T* bootstrap, T* advantages, T* returns, int64_t num_tokens, T gamma,
                 T decay, bool zero_gaps) {
  const int64_t n = blockIdx.x;
  const Range range = segment_of(cu_seqlens, n, num_tokens);
  const auto load = [&](int64_t t) -> Token<T> {
    if (mask && !mask[t]) return {0, 0, zero_gaps};
    return {rewards[t], values[t], true};
  };
  const auto store = [&](int64_t t, T advantage, T value) {
    const bool counts = !mask || mask[t];
    advantages[t] = counts ? advantage : 0;
    returns[t] = counts ? advantage + value : 0;
  };
  scan_segment<T>(range.begin, range.end, bootstrap ? bootstrap[n] : T(0), gamma, decay, load,
                  store);
}

template <class T>
void gae(const T* rewards, const T* values, const int32_t* cu_seqlens, const bool* mask,
         const T* bootstrap, T* advantages, T* returns, int64_t num_tokens, int64_t num_segments,
         double gamma, double lam, bool zero_gaps, cudaStream_t stream) {
  FASTRLHF_LAUNCH(gae_segments<T>, num_segments, kThreads, stream, rewards, values, cu_seqlens,
                  mask, bootstrap, advantages, returns, num_tokens, static_cast<T>(gamma),
                  static_cast<T>(gamma * lam), zero_gaps);
}

FASTRLHF_KERNEL(gae_float32, gae<float>)
FASTRLHF_KERNEL(gae_float64, gae<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
