// One draw a row by inverse CDF, with the log-probability of what was drawn.
#include <stdlib.h>

#include "exp.h"
#include "kernel.h"

namespace FASTRLHF_ISA {
namespace {

constexpr int64_t NUM_BLOCKS =
    512;  // the CDF is kept at this many points; within a block it is summed again

uint64_t mix(uint64_t z) {  // the output function of splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// In [0, 1), number `position` of the splitmix64 stream that starts at the hash of `seed`.
double uniform(int64_t seed, int64_t position) {
  const uint64_t golden = 0x9E3779B97F4A7C15u;
  const uint64_t start = mix(static_cast<uint64_t>(seed) + golden);
  return static_cast<double>(mix(start + golden * (static_cast<uint64_t>(position) + 1)) >> 11) *
         0x1p-53;
}

// Unsigned integers in the order of the floating-point numbers.
inline uint32_t order_of(float x) {
  uint32_t bits;
  x += 0.f;  // -0 and 0 are one number
  memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline uint64_t order_of(double x) {
  uint64_t bits;
  x += 0.;
  memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// Returns the largest c such that the tokens with order >= c weigh `wanted` in all, among those
// with order >= lowest; a null `weights` counts them. Radix descent: each pass fixes the next 8
// bits of c.
template <class T, class Order>
Order weighted_quantile(const T* logits, const T* weights, int64_t size, Order lowest,
                        double wanted) {
  const int num_bits = 8 * sizeof(Order);
  Order prefix = 0;
  for (int shift = num_bits - 8; shift >= 0; shift -= 8) {
    double sums[256] = {0};
    for (int64_t v = 0; v < size; v++) {
      const Order order = order_of(logits[v]);
      const bool inside = shift + 8 == num_bits || order >> (shift + 8) == prefix;
      if (inside && order >= lowest)
        sums[order >> shift & 255] += weights ? static_cast<double>(weights[v]) : 1.;
    }
    int digit = 255;
    for (; digit > 0 && sums[digit] < wanted; digit--) wanted -= sums[digit];
    prefix = prefix << 8 | static_cast<Order>(digit);
  }
  return prefix < lowest ? lowest : prefix;
}

template <class T>
double sum_blocks(const T* weights, int64_t size, int64_t width, double* sums) {
  double total = 0;
  for (int64_t start = 0, block = 0; start < size; start += width, block++) {
    const int64_t end = start + width < size ? start + width : size;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = start; v < end; v++) sum += weights[v];
    sums[block] = sum;
    total += sums[block];
  }
  return total;
}

// Returns the first token at which the running sum of the weights exceeds `target`: never one
// without weight.
template <class T>
int64_t inverse_cdf(const T* weights, int64_t size, int64_t width, const double* sums,
                    double target) {
  int64_t block = 0, last = 0;
  for (int64_t b = 0; b * width < size;
       b++) {  // rounding may leave target at the end: then the last one with weight
    if (sums[b] > 0) block = b;
    if (target < sums[b]) break;
    target -= sums[b];
  }
  const int64_t end = (block + 1) * width < size ? (block + 1) * width : size;
  for (int64_t v = block * width; v < end; v++) {
    if (weights[v] > 0) last = v;
    if (target < weights[v]) break;
    target -= weights[v];
  }
  return last;
}

struct Truncation {
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
  double min_p;   // 0: none
};

// Sets the weights of the tokens that top-k, top-p and min-p drop to 0.
template <class T>
void truncate(const T* logits, T* weights, int64_t size, double total, Truncation cut) {
  using Order = decltype(order_of(T()));
  Order lowest = 0;
  if (cut.top_k > 0 && cut.top_k < size)
    lowest = weighted_quantile<T, Order>(logits, nullptr, size, 0, static_cast<double>(cut.top_k));
  if (cut.top_p < 1) {
    double kept = lowest ? 0 : total;
    for (int64_t v = 0; lowest && v < size; v++)
      if (order_of(logits[v]) >= lowest) kept += weights[v];
    lowest = weighted_quantile<T, Order>(logits, weights, size, lowest, cut.top_p * kept);
  }
  const T least = static_cast<T>(cut.min_p);  // the most likely token weighs 1
  for (int64_t v = 0; v < size; v++)
    if (order_of(logits[v]) < lowest || weights[v] < least) weights[v] = 0;
}

template <class T>
void sample_tokens(const T* logits, const int64_t* seeds, const int64_t* positions, int64_t* tokens,
                   T* logprobs, T* sampler_logprobs, int64_t num_rows, int64_t size,
                   double temperature, int64_t top_k, double top_p, double min_p,
                   int64_t num_threads) {
  const bool truncated = (top_k > 0 && top_k < size) || top_p < 1 || min_p > 0;
  const int64_t width = size > 16 * NUM_BLOCKS ? (size + NUM_BLOCKS - 1) / NUM_BLOCKS : 16;
  const T scale = static_cast<T>(1 / temperature);
#pragma omp parallel num_threads(num_threads)
  {
    T* weights = static_cast<T*>(malloc(size * sizeof(T)));
    double sums[NUM_BLOCKS];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < num_rows; n++) {
      const T* row = logits + n * size;
      T highest = -INFINITY;
#pragma omp simd reduction(max : highest)
      for (int64_t v = 0; v < size; v++) highest = row[v] > highest ? row[v] : highest;
#pragma omp simd
      for (int64_t v = 0; v < size; v++) weights[v] = exp_nonpositive((row[v] - highest) * scale);
      const double total = sum_blocks(weights, size, width, sums);
      double kept = total;
      if (!(total > 0)) {  // NaN
        tokens[n] = 0;
        logprobs[n] = sampler_logprobs[n] = NAN;
        continue;
      }
      if (truncated) {
        truncate(row, weights, size, total, {top_k, top_p, min_p});
        kept = sum_blocks(weights, size, width, sums);
      }
      const int64_t token =
          inverse_cdf(weights, size, width, sums, uniform(seeds[n], positions[n]) * kept);
      const double scaled = static_cast<double>((row[token] - highest) * scale);
      tokens[n] = token;
      logprobs[n] = static_cast<T>(scaled - log(total));
      sampler_logprobs[n] = static_cast<T>(scaled - log(kept));
    }
    free(weights);
  }
}

FASTRLHF_KERNEL(sample_tokens_float32, sample_tokens<float>)
FASTRLHF_KERNEL(sample_tokens_float64, sample_tokens<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
