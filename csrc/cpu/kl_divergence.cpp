// Divergence of two rows of logits, and its gradient in both. The Kullback-Leibler divergence takes
// one read of each; that of Jensen and Shannon a second, by which time the rows are in the cache.
#include "exp.h"
#include "half.h"
#include "kernel.h"
#include "rows.h"

namespace FASTRLHF_ISA {
namespace {

// What a row leaves for its gradient: log p_v = (x_v - highest_p) scale - log_sum_p, and the sums
// over v of p (log p - log of the other) and of q (log q - log of the other), where the other is m
// for Jensen and Shannon. Kullback and Leibler have no use for the last.
struct Statistics {
  double highest_p, log_sum_p, highest_q, log_sum_q, of_p, of_q;
};

// Over a row, with z = (x - highest) scale: sums of e^zp, of e^zq and of e^zp (zp - zq).
struct Sums {
  double highest_p, highest_q, exps_p, exps_q, crossed;

  // Moves to maxima that are at least the present ones. Equal moves cancel, so that equal rows have
  // a divergence of exactly 0; q moving from 0 makes `crossed` infinite.
  void rise(double p, double q, double scale) {
    const double shift_p = p > highest_p ? (highest_p - p) * scale : 0, factor = exp(shift_p);
    const double shift_q = q > highest_q ? (highest_q - q) * scale : 0;
    crossed = exps_p * factor > 0 ? factor * (crossed + exps_p * (shift_p - shift_q)) : 0;
    exps_p *= factor;
    exps_q *= exp(shift_q);
    highest_p = p > highest_p ? p : highest_p;
    highest_q = q > highest_q ? q : highest_q;
  }
};

template <class In>
Sums sums_of(const In* row_p, const In* row_q, int64_t size, double scale) {
  using T = Wide<In>;
  using V = Lanes<T>;
  T buffer_p[BLOCK], buffer_q[BLOCK];
  Sums sums = {-INFINITY, -INFINITY, 0, 0, 0};
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t width = size - start < BLOCK ? size - start : BLOCK;
    const T* p = widen(row_p + start, buffer_p, width);
    const T* q = widen(row_q + start, buffer_q, width);
    sums.rise(highest_of(p, width), highest_of(q, width), scale);
    const T origin_p = sums.highest_p == -INFINITY ? 0 : static_cast<T>(sums.highest_p);
    const T origin_q = sums.highest_q == -INFINITY ? 0 : static_cast<T>(sums.highest_q);
    const T factor = static_cast<T>(scale);
    V exps_p = {}, exps_q = {}, crossed = {};
    for (int64_t v = 0; v < width; v += kLanesOf<V>) {
      const V to_p = lanes_at(p + v) - origin_p, to_q = lanes_at(q + v) - origin_q;
      const V e = exp_nonpositive(to_p * factor);
      exps_p += e;
      exps_q += exp_nonpositive(to_q * factor);
      crossed += select(e > 0, e * (to_p - to_q), all<V>(0));  // a NaN stays in exps_p
    }
    sums.exps_p += sum_lanes(exps_p);
    sums.exps_q += sum_lanes(exps_q);
    sums.crossed += sum_lanes(crossed) * scale;
  }
  return sums;
}

// log(p / m) and log(q / m) where m = (p + q) / 2, from the logarithms of p and q; exactly 0 where
// they are equal. With e the smaller over the larger, that of the larger is log(2 / (1 + e)).
template <class X>
static FASTRLHF_INLINE void log_of_ratios(X log_p, X log_q, X* of_p, X* of_q) {
  const X difference = log_p - log_q, gap = absolute(difference);
  const X e = exp_nonpositive(-gap);
  const X of_larger = twice_artanh((1 - e) / (3 + e)), of_smaller = of_larger - gap;
  *of_p = select(difference < 0, of_smaller, of_larger);
  *of_q = select(difference < 0, of_larger, of_smaller);
}

// Logits as logarithms of probabilities.
template <class In>
struct Logs {
  using T = Wide<In>;
  const In* row;
  T highest, log_sum, scale;
  template <class X>
  FASTRLHF_INLINE X of(X logits) const {
    return (logits - highest) * scale - log_sum;
  }
  FASTRLHF_INLINE T operator[](int64_t v) const { return of(load(row[v])); }
};

template <class In>
void add_jensen_shannon(Logs<In> logs_p, Logs<In> logs_q, int64_t size, Statistics* at) {
  using T = Wide<In>;
  using V = Lanes<T>;
  T buffer_p[BLOCK], buffer_q[BLOCK];
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t width = size - start < BLOCK ? size - start : BLOCK;
    const T* p = widen(logs_p.row + start, buffer_p, width);
    const T* q = widen(logs_q.row + start, buffer_q, width);
    V sum_p = {}, sum_q = {};
    for (int64_t v = 0; v < width; v += kLanesOf<V>) {
      const V log_p = logs_p.of(lanes_at(p + v));
      const V log_q = logs_q.of(lanes_at(q + v));
      const V share_p = exp_nonpositive(log_p), share_q = exp_nonpositive(log_q);
      V of_p, of_q;
      log_of_ratios(log_p, log_q, &of_p, &of_q);
      sum_p += select(share_p == 0, all<V>(0), share_p * of_p);
      sum_q += select(share_q == 0, all<V>(0), share_q * of_q);
    }
    at->of_p += sum_lanes(sum_p);
    at->of_q += sum_lanes(sum_q);
  }
}

// divergence of each row: KL(p || q), or with jensen_shannon (KL(p || m) + KL(q || m)) / 2, m = (p
// + q) / 2; statistics: six numbers a row.
template <class In>
void kl_divergence(const In* logits_p, const In* logits_q, Wide<In>* divergence,
                   Wide<In>* statistics, int64_t num_rows, int64_t size, int64_t stride_p,
                   int64_t stride_q, double temperature, bool jensen_shannon, int64_t num_threads) {
  using T = Wide<In>;
  const double scale = 1 / temperature;
#pragma omp parallel for num_threads(useful(num_threads, num_rows, size)) \
    schedule(dynamic, 1 + 65536 / size)
  for (int64_t r = 0; r < num_rows; r++) {
    const In *p = logits_p + r * stride_p, *q = logits_q + r * stride_q;
    const Sums sums = sums_of(p, q, size, scale);
    Statistics at = {sums.highest_p, log(sums.exps_p), sums.highest_q, log(sums.exps_q), 0, 0};
    double result;
    if (jensen_shannon) {
      const T factor = static_cast<T>(scale);
      add_jensen_shannon<In>({p, T(at.highest_p), T(at.log_sum_p), factor},
                             {q, T(at.highest_q), T(at.log_sum_q), factor}, size, &at);
      result = (at.of_p + at.of_q) / 2;
    } else {
      // the difference of the two logarithms would lose digits
      result = at.of_p = sums.crossed / sums.exps_p + log(sums.exps_q / sums.exps_p);
    }
    divergence[r] = static_cast<T>(result < 0 ? 0 : result);
    T* out = statistics + 6 * r;
    out[0] = static_cast<T>(at.highest_p);
    out[1] = static_cast<T>(at.log_sum_p);
    out[2] = static_cast<T>(at.highest_q);
    out[3] = static_cast<T>(at.log_sum_q);
    out[4] = static_cast<T>(at.of_p);
    out[5] = static_cast<T>(at.of_q);
  }
}

// What the gradient of a row needs beside its logits; `upstream` is divided by the temperature.
template <class T>
struct Row {
  T upstream, of_p, of_q;
};

// Either gradient may be null, or lie where its logits are.
template <class In, bool JENSEN_SHANNON, bool OF_P, bool OF_Q>
void gradient_of(Logs<In> logs_p, Logs<In> logs_q, In* grad_p, In* grad_q, int64_t size,
                 Row<Wide<In>> at) {
  using T = Wide<In>;
#pragma omp simd
  for (int64_t v = 0; v < size; v++) {
    const T log_p = logs_p[v], log_q = logs_q[v];
    const T p = exp_nonpositive(log_p), q = exp_nonpositive(log_q);
    T of_p = log_p - log_q, of_q = 0;
    if constexpr (JENSEN_SHANNON) log_of_ratios(log_p, log_q, &of_p, &of_q);
    if constexpr (OF_P) store(grad_p + v, p == 0 ? 0 : at.upstream * p * (of_p - at.of_p));
    if constexpr (OF_Q && JENSEN_SHANNON)
      store(grad_q + v, q == 0 ? 0 : at.upstream * q * (of_q - at.of_q));
    if constexpr (OF_Q && !JENSEN_SHANNON) store(grad_q + v, at.upstream * (q - p));
  }
}

template <class In, bool JENSEN_SHANNON>
void gradient_of(Logs<In> logs_p, Logs<In> logs_q, In* grad_p, In* grad_q, int64_t size,
                 Row<Wide<In>> at) {
  if (grad_p && grad_q)
    gradient_of<In, JENSEN_SHANNON, true, true>(logs_p, logs_q, grad_p, grad_q, size, at);
  else if (grad_p)
    gradient_of<In, JENSEN_SHANNON, true, false>(logs_p, logs_q, grad_p, grad_q, size, at);
  else
    gradient_of<In, JENSEN_SHANNON, false, true>(logs_p, logs_q, grad_p, grad_q, size, at);
}

// Writes the gradients that are not null, which may lie where the logits are. A row whose upstream
// gradient is 0 gets 0 and is not read.
template <class In>
void kl_divergence_backward(const Wide<In>* grad, const In* logits_p, const In* logits_q,
                            const Wide<In>* statistics, In* grads_p, In* grads_q, int64_t num_rows,
                            int64_t size, int64_t stride_p, int64_t stride_q, int64_t grad_stride_p,
                            int64_t grad_stride_q, double temperature, bool jensen_shannon,
                            int64_t num_threads) {
  using T = Wide<In>;
  const double scale = 1 / temperature, share = jensen_shannon ? scale / 2 : scale;
#pragma omp parallel for num_threads(useful(num_threads, num_rows, size)) \
    schedule(dynamic, 1 + 65536 / size)
  for (int64_t r = 0; r < num_rows; r++) {
    In* grad_p = grads_p ? grads_p + r * grad_stride_p : nullptr;
    In* grad_q = grads_q ? grads_q + r * grad_stride_q : nullptr;
    if (grad[r] == 0) {
      if (grad_p) memset(grad_p, 0, size * sizeof(In));
      if (grad_q) memset(grad_q, 0, size * sizeof(In));
      continue;
    }
    const T *of_row = statistics + 6 * r, factor = static_cast<T>(scale);
    const Row<T> at = {T(static_cast<double>(grad[r]) * share), of_row[4], of_row[5]};
    const Logs<In> p = {logits_p + r * stride_p, of_row[0], of_row[1], factor};
    const Logs<In> q = {logits_q + r * stride_q, of_row[2], of_row[3], factor};
    if (jensen_shannon)
      gradient_of<In, true>(p, q, grad_p, grad_q, size, at);
    else
      gradient_of<In, false>(p, q, grad_p, grad_q, size, at);
  }
}

FASTRLHF_KERNEL(kl_divergence_float32, kl_divergence<float>)
FASTRLHF_KERNEL(kl_divergence_float64, kl_divergence<double>)
FASTRLHF_KERNEL(kl_divergence_bfloat16, kl_divergence<bfloat16>)
FASTRLHF_KERNEL(kl_divergence_float16, kl_divergence<float16>)
FASTRLHF_KERNEL(kl_divergence_backward_float32, kl_divergence_backward<float>)
FASTRLHF_KERNEL(kl_divergence_backward_float64, kl_divergence_backward<double>)
FASTRLHF_KERNEL(kl_divergence_backward_bfloat16, kl_divergence_backward<bfloat16>)
FASTRLHF_KERNEL(kl_divergence_backward_float16, kl_divergence_backward<float16>)

}  // namespace
}  // namespace FASTRLHF_ISA
