// From scores and log-probabilities to whitened advantages: rewards, advantages, returns and their
// statistics in one pass over the tokens of a few sequences, which stay in cache; whitening is the
// second pass.
#include "kernel.h"
#include "numeric.h"
#include "scan.h"

namespace FASTRLHF_ISA {
namespace {

constexpr int64_t kNumStats = 7;
constexpr int64_t kGroup = 4;  // sequences whose tensors stay in cache from one pass to the next

// What the statistics are made of: sums, and for advantages and returns mean and sum of squared
// differences to it.
struct Row {
  double n, mean_advantage, squared_advantage, mean_return, squared_return, kl, reward, value;
};

static inline void merge(Row& a, const Row& b) {
  const double n = a.n + b.n;
  if (n == 0) return;
  const double share = b.n / n, weight = a.n * share;
  const double d = b.mean_advantage - a.mean_advantage, e = b.mean_return - a.mean_return;
  a.mean_advantage += d * share;
  a.squared_advantage += b.squared_advantage + d * d * weight;
  a.mean_return += e * share;
  a.squared_return += b.squared_return + e * e * weight;
  a.kl += b.kl;
  a.reward += b.reward;
  a.value += b.value;
  a.n = n;
}

template <class T>
static Row row_of(const T* logprobs, const T* ref_logprobs, const T* values, const T* rewards,
                  const T* advantages, const T* returns, int64_t begin, int64_t end) {
  Vec advantage = {}, target = {}, kl = {}, reward = {}, value = {};
  for_lanes(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
    advantage += load(advantages + i, size);
    target += load(returns + i, size);
    kl += load(logprobs + i, size) - load(ref_logprobs + i, size);
    reward += load(rewards + i, size);
    value += load(values + i, size);
  });
  Row row = {};
  if (begin == end) return row;
  row.n = static_cast<double>(end - begin);
  row.mean_advantage = sum_lanes(advantage) / row.n;
  row.mean_return = sum_lanes(target) / row.n;
  row.kl = sum_lanes(kl);
  row.reward = sum_lanes(reward);
  row.value = sum_lanes(value);
  Vec squared_advantage = {}, squared_return = {};
  for_lanes(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
    const Bits inside = load_mask(nullptr, i, size);
    const Vec d = select(inside, load(advantages + i, size) - row.mean_advantage, all(0));
    const Vec e = select(inside, load(returns + i, size) - row.mean_return, all(0));
    squared_advantage += d * d;
    squared_return += e * e;
  });
  row.squared_advantage = sum_lanes(squared_advantage);
  row.squared_return = sum_lanes(squared_return);
  return row;
}

// One sequence [begin, end).
template <class T>
static FASTRLHF_INLINE void shape(T score, const T* logprobs, const T* ref_logprobs,
                                  const T* values, T* rewards, T* advantages, T* returns,
                                  int64_t begin, int64_t end, T kl_coef, T gamma,
                                  const Decay<T>& decay) {
  if (begin == end) return;
  for (int64_t t = begin; t < end; t++) rewards[t] = -kl_coef * (logprobs[t] - ref_logprobs[t]);
  rewards[end - 1] += score;
  scan_deltas<T>(rewards, values, T(0), begin, end, gamma, decay,
                 [&](int64_t t, Lanes<T> sums, int size) FASTRLHF_LAMBDA {
                   store(advantages + t, sums, size);
                   store(returns + t, sums + load<Lanes<T>>(values + t, size), size);
                 });
}

// r_t = -kl_coef (logprob - ref_logprob), plus the score at the last token of a sequence; from
// these advantages (which `whitens` whitens) and returns. stats: means a sequence of KL and
// reward; means a token of value, return and advantage; the deviation of the advantage; the
// explained variance.
template <class T>
void ppo_advantages(const T* scores, const T* logprobs, const T* ref_logprobs, const T* values,
                    const int32_t* cu_seqlens, T* rewards, T* advantages, T* returns, T* stats,
                    int64_t num_sequences, double kl_coef, double gamma, double lam, bool whitens,
                    double eps, int64_t num_threads) {
  const int64_t num_tokens = cu_seqlens[num_sequences];
  // whole groups to a chunk, and a cut that depends on the number of sequences alone
  const int64_t num_groups = (num_sequences + kGroup - 1) / kGroup;
  const int64_t size = (num_groups + kChunks - 1) / kChunks * kGroup;
  const Decay<T> decay(gamma * lam);
  Row rows[kChunks] = {};
  on_threads(num_tokens > kWorthThreads, num_threads, [=, &rows]() FASTRLHF_ONCE {
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < kChunks; c++) {
      const int64_t stop = (c + 1) * size < num_sequences ? (c + 1) * size : num_sequences;
      for (int64_t first = c * size; first < stop; first += kGroup) {
        const int64_t last = stop - first < kGroup ? stop : first + kGroup;
        for (int64_t n = first; n < last; n++)
          shape(scores[n], logprobs, ref_logprobs, values, rewards, advantages, returns,
                cu_seqlens[n], cu_seqlens[n + 1], static_cast<T>(kl_coef), static_cast<T>(gamma),
                decay);
        merge(rows[c], row_of(logprobs, ref_logprobs, values, rewards, advantages, returns,
                              cu_seqlens[first], cu_seqlens[last]));
      }
    }
  });
  Row all_rows = {};
  for (const Row& row : rows) merge(all_rows, row);
  const double n = num_tokens > 0 ? static_cast<double>(num_tokens) : 1.0;
  const double sequences = num_sequences > 0 ? static_cast<double>(num_sequences) : 1.0;
  const double variance = all_rows.squared_advantage / n, mean = all_rows.mean_advantage;
  const double squares = all_rows.squared_return;
  const double found[kNumStats] = {all_rows.kl / sequences,
                                   all_rows.reward / sequences,
                                   all_rows.value / n,
                                   all_rows.mean_return,
                                   mean,
                                   sqrt(variance),
                                   squares == 0 ? 0 : 1 - all_rows.squared_advantage / squares};
  for (int64_t i = 0; i < kNumStats; i++) stats[i] = static_cast<T>(found[i]);
  if (!whitens) return;
  const double scale = 1 / sqrt(variance + eps);
  for_elements(num_tokens, num_threads, [&](int64_t i, int count) FASTRLHF_LAMBDA {
    store(advantages + i, (load(advantages + i, count) - mean) * scale, count);
  });
}

FASTRLHF_KERNEL(ppo_advantages_float32, ppo_advantages<float>)
FASTRLHF_KERNEL(ppo_advantages_float64, ppo_advantages<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
