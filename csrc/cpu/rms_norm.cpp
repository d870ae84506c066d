// Rows over their root mean square, times a weight, in one pass over memory; the gradient, too.
#include "half.h"
#include "kernel.h"
#include "numeric.h"
#include "rows.h"

namespace FASTRLHF_ISA {
namespace {

template <class In>
static FASTRLHF_INLINE double scale_of(const In* x, int64_t width, double eps) {
  typedef Lanes<Wide<In>> V;
  V squares = {};
  for_lanes<V>(0, width, [&](int64_t d, int size) FASTRLHF_LAMBDA {
    const V at = wide_lanes(x + d, size);
    squares += at * at;
  });
  return 1 / sqrt(sum_lanes(squares) / static_cast<double>(width) + eps);
}

// out[r, d] = weight[d] x[r, d] / sqrt(mean x[r]^2 + eps). A row's second read is from the cache.
template <class In>
void rms_norm(const In* hidden, const In* weight, In* out, int64_t num_rows, int64_t width,
              double eps, int64_t num_threads) {
  typedef Lanes<Wide<In>> V;
  on_threads(num_rows * width > kWorthThreads, num_threads, [=]() FASTRLHF_ONCE {
#pragma omp for
    for (int64_t r = 0; r < num_rows; r++) {
      const In* x = hidden + r * width;
      In* to = out + r * width;
      const V scale = all<V>(scale_of(x, width, eps));
      for_lanes<V>(0, width, [=](int64_t d, int size) FASTRLHF_LAMBDA {
        store_wide(to + d, wide_lanes(x + d, size) * scale * wide_lanes(weight + d, size), size);
      });
    }
  });
}

// With n = x scale, x gets scale (grad weight - n mean(grad weight n)), and `sum` grows by grad n.
template <class In>
static FASTRLHF_INLINE void row_backward(const In* grad, const In* x, const In* weight, In* to,
                                         Wide<In>* sum, int64_t width, double eps) {
  typedef Lanes<Wide<In>> V;
  V dot = {};
  for_lanes<V>(0, width, [&](int64_t d, int size) FASTRLHF_LAMBDA {
    dot += wide_lanes(grad + d, size) * wide_lanes(weight + d, size) * wide_lanes(x + d, size);
  });
  const double exact = scale_of(x, width, eps);
  const V scale = all<V>(exact);
  const V share = all<V>(exact * exact * sum_lanes(dot) / static_cast<double>(width));
  for_lanes<V>(0, width, [=](int64_t d, int size) FASTRLHF_LAMBDA {
    const V at = wide_lanes(x + d, size), up = wide_lanes(grad + d, size);
    store_wide(to + d, scale * (up * wide_lanes(weight + d, size) - at * share), size);
    store(sum + d, load<V>(sum + d, size) + up * (at * scale), size);
  });
}

// The weight's gradient is summed by chunks of chunk_rows into `sums`, which are added in order.
template <class In>
void rms_norm_backward(const In* grad, const In* hidden, const In* weight, In* of_hidden,
                       In* of_weight, Wide<In>* sums, int64_t num_rows, int64_t width,
                       int64_t chunk_rows, double eps, int64_t num_threads) {
  typedef Lanes<Wide<In>> V;
  const int64_t num_chunks = (num_rows + chunk_rows - 1) / chunk_rows;
  on_threads(num_rows * width > kWorthThreads, num_threads, [=]() FASTRLHF_ONCE {
#pragma omp for
    for (int64_t c = 0; c < num_chunks; c++) {
      const int64_t first = c * chunk_rows;
      const int64_t end = first + chunk_rows < num_rows ? first + chunk_rows : num_rows;
      Wide<In>* sum = sums + c * width;
      for (int64_t d = 0; d < width; d++) sum[d] = 0;
      for (int64_t r = first; r < end; r++)
        row_backward(grad + r * width, hidden + r * width, weight, of_hidden + r * width, sum,
                     width, eps);
    }
#pragma omp for
    for (int64_t start = 0; start < width; start += kLanesOf<V>) {
      const int size = width - start < kLanesOf<V> ? static_cast<int>(width - start) : kLanesOf<V>;
      V total = {};
      for (int64_t c = 0; c < num_chunks; c++) total += load<V>(sums + c * width + start, size);
      store_wide(of_weight + start, total, size);
    }
  });
}

FASTRLHF_KERNEL(rms_norm_float32, rms_norm<float>)
FASTRLHF_KERNEL(rms_norm_float64, rms_norm<double>)
FASTRLHF_KERNEL(rms_norm_bfloat16, rms_norm<bfloat16>)
FASTRLHF_KERNEL(rms_norm_float16, rms_norm<float16>)
FASTRLHF_KERNEL(rms_norm_backward_float32, rms_norm_backward<float>)
FASTRLHF_KERNEL(rms_norm_backward_float64, rms_norm_backward<double>)
FASTRLHF_KERNEL(rms_norm_backward_bfloat16, rms_norm_backward<bfloat16>)
FASTRLHF_KERNEL(rms_norm_backward_float16, rms_norm_backward<float16>)

}  // namespace
}  // namespace FASTRLHF_ISA
