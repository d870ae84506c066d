// The clipped surrogate of PPO with its statistics and its gradient, in one pass.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

template <class V>
struct Term {
  V loss, plain;   // plain is without any bound: minus the advantage times the ratio
  BitsOf<V> held;  // by a bound, so that it gets no gradient
};

struct Bounds {
  double lowest, highest, dual;
};

// max(-A rho, -A clip(rho, lowest, highest)), at most -A dual where A < 0; an infinite dual is
// none. Where A = 0 it is 0, also if rho overflows; a NaN stays.
template <class V>
static FASTRLHF_INLINE Term<V> surrogate(V ratio, V advantage, Bounds bounds) {
  const V lowest = all<V>(bounds.lowest), highest = all<V>(bounds.highest);
  ratio = select((advantage == 0) & (ratio > 1), all<V>(1), ratio);
  const V bounded = select(ratio < lowest, lowest, select(ratio > highest, highest, ratio));
  const V plain = -advantage * ratio, clipped = -advantage * bounded;
  const V limit = -advantage * all<V>(bounds.dual);
  const BitsOf<V> far = clipped > plain;
  const V loss = select(far, clipped, plain);
  const BitsOf<V> over = (advantage < 0) & (loss > limit);
  return {select(over, limit, loss), plain, far | over};
}

// What some tokens give to the loss and its statistics.
template <class V>
struct Sums {
  V losses = {}, held = {}, kls = {}, ratios = {};
  V high = all<V>(-INFINITY), low = all<V>(INFINITY);

  // share: what a token weighs; 0 where it does not count
  FASTRLHF_INLINE void add(const Term<V>& term, V log_ratio, V exp_log_ratio, V ratio,
                           BitsOf<V> counts, V share) {
    losses += share * term.loss;
    held += select(term.held, share, all<V>(0));
    kls += share * exp_minus_linear(log_ratio, exp_log_ratio);
    ratios += share * ratio;
    high = larger(high, select(counts, ratio, all<V>(-INFINITY)));
    low = smaller(low, select(counts, ratio, all<V>(INFINITY)));
  }
};

// What all of them give.
struct Totals {
  Slots losses{0}, held{0}, kls{0}, ratios{0}, highs{-INFINITY}, lows{-INFINITY};

  template <class V>
  FASTRLHF_INLINE void add(int64_t chunk, const Sums<V>& sums) {
    losses.of[chunk] += sum_lanes(sums.losses);
    held.of[chunk] += sum_lanes(sums.held);
    kls.of[chunk] += sum_lanes(sums.kls);
    ratios.of[chunk] += sum_lanes(sums.ratios);
    highs.of[chunk] = larger(highs.of[chunk], max_lanes(sums.high));
    lows.of[chunk] = larger(lows.of[chunk], max_lanes(-sums.low));
  }

  template <class T>
  void write(T* loss, T* stats, double scale, bool any) const {
    const double sum_ratio = ratios.sum();
    const double nan = isnan(sum_ratio) ? NAN : 0.0;  // a comparison loses a NaN, a sum does not
    *loss = static_cast<T>(losses.sum() * scale);
    stats[0] = static_cast<T>(held.sum() * scale);
    stats[1] = static_cast<T>(kls.sum() * scale);
    stats[2] = static_cast<T>(sum_ratio * scale);
    stats[3] = static_cast<T>(any ? highs.max() + nan : 0.0);
    stats[4] = static_cast<T>(any ? -lows.max() + nan : 0.0);
  }
};

// loss = sum of the surrogate at rho = exp(logprob - old) / denominator; stats = (fraction held, k3
// of old || new, rho, max rho, min rho); grad = d loss / d logprobs. A denominator of 0 stands for
// the number of tokens that count.
template <class T>
void ppo_policy_loss(const T* logprobs, const T* old_logprobs, const T* advantages,
                     const bool* mask, T* loss, T* stats, T* grad, int64_t n, double clip_low,
                     double clip_high, double dual, double denominator, int64_t num_threads) {
  const int64_t kept = count(mask, n);
  const double scale = mean_scale(denominator, kept);
  const Bounds bounds = {1 - clip_low, 1 + clip_high, dual};
  typedef Lanes<T> V;
  Totals totals;
  for_pieces(
      n, num_threads, [=, &totals](int64_t begin, int64_t end, int64_t chunk) FASTRLHF_LAMBDA {
        Sums<V> sums;
        for_lanes<V>(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
          const BitsOf<V> counts = load_mask<V>(mask, i, size);
          const V log_ratio = select(
              counts, load<V>(logprobs + i, size) - load<V>(old_logprobs + i, size), all<V>(0));
          const V advantage = select(counts, load<V>(advantages + i, size), all<V>(0));
          const V ratio = exp_lanes(log_ratio), share = select(counts, all<V>(1), all<V>(0));
          const Term<V> term = surrogate(ratio, advantage, bounds);
          store(grad + i, select(term.held, all<V>(0), term.plain * all<V>(scale)), size);
          sums.add(term, log_ratio, ratio, ratio, counts, share);
        });
        totals.add(chunk, sums);
      });
  totals.write(loss, stats, scale, kept > 0);
}

// The same with one rho a sequence, exp(mean of logprob - old over its tokens that count). A token
// weighs 1 / (tokens that count in its sequence); a denominator of 0 stands for the number of
// sequences in which one counts.
template <class T>
void ppo_sequence_loss(const T* logprobs, const T* old_logprobs, const T* advantages,
                       const int32_t* cu_seqlens, const bool* mask, T* loss, T* stats, T* grad,
                       int64_t num_sequences, double clip_low, double clip_high, double dual,
                       double denominator, int64_t num_threads) {
  const auto kept_in = [&](int64_t n) {
    return count(mask ? mask + cu_seqlens[n] : nullptr, cu_seqlens[n + 1] - cu_seqlens[n]);
  };
  int64_t kept = 0;
  for (int64_t n = 0; n < num_sequences; n++) kept += kept_in(n) > 0;
  const double scale = mean_scale(denominator, kept);
  const Bounds bounds = {1 - clip_low, 1 + clip_high, dual};
  Totals totals;
  const int64_t size = num_sequences / kChunks + 1;
  on_threads(cu_seqlens[num_sequences] > kWorthThreads, num_threads, [=, &totals]() FASTRLHF_ONCE {
#pragma omp for
    for (int64_t chunk = 0; chunk < kChunks; chunk++) {
      const int64_t last = (chunk + 1) * size < num_sequences ? (chunk + 1) * size : num_sequences;
      for (int64_t n = chunk * size; n < last; n++) {
        const int64_t start = cu_seqlens[n], end = cu_seqlens[n + 1], num_kept = kept_in(n);
        const double weight = num_kept > 0 ? 1 / static_cast<double>(num_kept) : 0.0;
        const auto log_ratios = [&](int64_t i, int lanes, Bits counts) FASTRLHF_LAMBDA {
          return select(counts, load(logprobs + i, lanes) - load(old_logprobs + i, lanes), all(0));
        };
        Vec total = {};
        for_lanes(start, end, [&](int64_t i, int lanes) FASTRLHF_LAMBDA {
          total += log_ratios(i, lanes, load_mask(mask, i, lanes));
        });
        const double ratio = exp(sum_lanes(total) * weight);
        Vec slope = {};
        Sums<Vec> sums;
        for_lanes(start, end, [&](int64_t i, int lanes) FASTRLHF_LAMBDA {
          const Bits counts = load_mask(mask, i, lanes);
          const Vec log_ratio = log_ratios(i, lanes, counts);
          const Vec advantage = select(counts, load(advantages + i, lanes), all(0));
          const Vec here = select(counts, all(ratio), all(1));
          const Term<Vec> term = surrogate(here, advantage, bounds);
          slope += select(term.held, all(0), term.plain);
          sums.add(term, log_ratio, exp_lanes(log_ratio), here, counts,
                   select(counts, all(weight), all(0)));
        });
        totals.add(chunk, sums);
        const Vec each = all(sum_lanes(slope) * weight * weight * scale);
        for_lanes(start, end, [&](int64_t i, int lanes) FASTRLHF_LAMBDA {
          store(grad + i, select(load_mask(mask, i, lanes), each, all(0)), lanes);
        });
      }
    }
  });
  totals.write(loss, stats, scale, kept > 0);
}

FASTRLHF_KERNEL(ppo_policy_loss_float32, ppo_policy_loss<float>)
FASTRLHF_KERNEL(ppo_policy_loss_float64, ppo_policy_loss<double>)
FASTRLHF_KERNEL(ppo_sequence_loss_float32, ppo_sequence_loss<float>)
FASTRLHF_KERNEL(ppo_sequence_loss_float64, ppo_sequence_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
