// Log-probability of a target and entropy of each row of logits in one read, and their gradient in one read and write.
#include "exp.h"
#include "half.h"
#include "kernel.h"
#include "rows.h"

namespace FASTRLHF_ISA {
namespace {

template <class T>
constexpr T LOWEST = sizeof(T) == 4 ? T(-87.3) : T(-746);  // e to this and below is 0

// Keeps 0 log 0 from being 0 * -inf = NaN; NaN stays NaN.
template <class X>
static FASTRLHF_INLINE X finite_log(X x) {
  const X lowest = all<X>(LOWEST<ElementOf<X>>);
  return select<X>(!(x < lowest), x, lowest);
}

// Over a row, with z = (x - highest) / temperature: the sum of e^z and of z e^z.
struct Sums {
  double highest, exps, weighted;
};

template <class In>
Sums sums_of(const In* row, int64_t size, double scale) {
  using T = Wide<In>;
  using V = Lanes<T>;
  T buffer[BLOCK];
  T highest = -INFINITY;
  double exps = 0, weighted = 0;
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t width = size - start < BLOCK ? size - start : BLOCK;
    const T* x = widen(row + start, buffer, width);
    const T block_highest = highest_of(x, width);
    if (block_highest > highest) {
      if (exps > 0) {
        const double shift = (static_cast<double>(highest) - block_highest) * scale, factor = exp(shift);
        weighted = factor > 0 ? factor * (weighted + exps * shift) : 0;
        exps *= factor;
      }
      highest = block_highest;
    }
    const T origin = highest == -INFINITY ? 0 : highest, factor = static_cast<T>(scale);
    V block_exps = {}, block_weighted = {};
    for (int64_t v = 0; v < width; v += kLanesOf<V>) {
      const V z = (lanes_at(x + v) - origin) * factor, e = exp_nonpositive(z);
      block_exps += e;
      block_weighted += e * finite_log(z);
    }
    exps += sum_lanes(block_exps);
    weighted += sum_lanes(block_weighted);
  }
  return {static_cast<double>(highest), exps, weighted};
}

// With z = (logits - highest) / temperature: log_sum = log sum e^z, logprob = z_y - log_sum, entropy = log_sum - sum p z.
// Row r uses temperature[r * temperature_step].
template <class In>
void token_logprobs(const In* logits, const int64_t* targets, const Wide<In>* temperature, Wide<In>* logprobs,
                    Wide<In>* entropy, Wide<In>* highest, Wide<In>* log_sum, int64_t num_rows, int64_t size,
                    int64_t stride, int64_t temperature_step, int64_t num_threads) {
  using T = Wide<In>;
#pragma omp parallel for num_threads(useful(num_threads, num_rows, size)) schedule(dynamic, 1 + 65536 / size)
  for (int64_t r = 0; r < num_rows; r++) {
    const In* row = logits + r * stride;
    const double scale = 1 / static_cast<double>(temperature[r * temperature_step]);
    const Sums sums = sums_of(row, size, scale);
    const double log_exps = log(sums.exps);
    const bool inside = targets[r] >= 0 && targets[r] < size;
    const double target = inside ? static_cast<double>(load(row[targets[r]])) : NAN;
    logprobs[r] = static_cast<T>((target - sums.highest) * scale - log_exps);
    entropy[r] = static_cast<T>(log_exps - sums.weighted / sums.exps);
    highest[r] = static_cast<T>(sums.highest);
    log_sum[r] = static_cast<T>(log_exps);
  }
}

// What the gradient of one row needs: log p_v = (x_v - highest) scale - log_sum. Keeping the two apart rather than their
// sum, log sum e^(x / temperature), keeps the digits of a row of large logits.
template <class T>
struct Row {
  T highest, log_sum, scale, entropy, grad_logprob, grad_entropy;
};

// grad_z_v = -p_v (grad_logprob + grad_entropy (log p_v + entropy)), but for the target's own column.
template <class In, bool WITH_ENTROPY>
void gradient_of(const In* row, In* grad, int64_t size, Row<Wide<In>> at) {
  using T = Wide<In>;
#pragma omp simd
  for (int64_t v = 0; v < size; v++) {
    const T log_p = (load(row[v]) - at.highest) * at.scale - at.log_sum;
    T slope = at.grad_logprob;
    if constexpr (WITH_ENTROPY) slope += at.grad_entropy * (finite_log(log_p) + at.entropy);
    store(grad + v, -exp_nonpositive(log_p) * slope * at.scale);
  }
}

// Writes the gradient of the logits to `grads`, which may be the logits themselves. The upstream gradients may be null.
// A row whose upstream gradients are 0 gets 0 and is not read.
template <class In>
void token_logprobs_backward(const Wide<In>* grad_logprobs, const Wide<In>* grad_entropy, const In* logits,
                             const int64_t* targets, const Wide<In>* temperature, const Wide<In>* entropy,
                             const Wide<In>* highest, const Wide<In>* log_sum, In* grads, int64_t num_rows,
                             int64_t size, int64_t stride, int64_t grad_stride, int64_t temperature_step,
                             int64_t num_threads) {
  using T = Wide<In>;
#pragma omp parallel for num_threads(useful(num_threads, num_rows, size)) schedule(dynamic, 1 + 65536 / size)
  for (int64_t r = 0; r < num_rows; r++) {
    const In* row = logits + r * stride;
    In* grad = grads + r * grad_stride;
    const bool inside = targets[r] >= 0 && targets[r] < size;
    const double g = !inside ? NAN : grad_logprobs ? static_cast<double>(grad_logprobs[r]) : 0;
    const double h = grad_entropy ? static_cast<double>(grad_entropy[r]) : 0;
    if (g == 0 && h == 0) {
      memset(grad, 0, size * sizeof(In));
      continue;
    }
    const double scale = 1 / static_cast<double>(temperature[r * temperature_step]);
    const double target = inside ? static_cast<double>(load(row[targets[r]])) : NAN;
    const Row<T> at = {highest[r], log_sum[r], T(scale), entropy[r], T(g), T(h)};
    if (h == 0)
      gradient_of<In, false>(row, grad, size, at);
    else
      gradient_of<In, true>(row, grad, size, at);
    if (inside) {
      const double log_p = (target - static_cast<double>(highest[r])) * scale - static_cast<double>(log_sum[r]);
      const double of_entropy = exp(log_p) * (finite_log(log_p) + static_cast<double>(entropy[r]));
      store(grad + targets[r], static_cast<T>((-g * expm1(log_p) - h * of_entropy) * scale));
    }
  }
}

FASTRLHF_KERNEL(token_logprobs_float32, token_logprobs<float>)
FASTRLHF_KERNEL(token_logprobs_float64, token_logprobs<double>)
FASTRLHF_KERNEL(token_logprobs_bfloat16, token_logprobs<bfloat16>)
FASTRLHF_KERNEL(token_logprobs_float16, token_logprobs<float16>)
FASTRLHF_KERNEL(token_logprobs_backward_float32, token_logprobs_backward<float>)
FASTRLHF_KERNEL(token_logprobs_backward_float64, token_logprobs_backward<double>)
FASTRLHF_KERNEL(token_logprobs_backward_bfloat16, token_logprobs_backward<bfloat16>)
FASTRLHF_KERNEL(token_logprobs_backward_float16, token_logprobs_backward<float16>)

}  // namespace
}  // namespace FASTRLHF_ISA
