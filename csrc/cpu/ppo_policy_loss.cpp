// The clipped surrogate of PPO with its statistics and its gradient, in one pass.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// loss = sum max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) / denominator,
// rho = exp(logprob - old); stats = (clip fraction, k3 of old || new, rho, max rho, min rho);
// grad = d loss / d logprobs. A denominator of 0 stands for the number of tokens that count.
template <class T>
void ppo_policy_loss(const T* logprobs, const T* old_logprobs, const T* advantages,
                     const bool* mask, T* loss, T* stats, T* grad, int64_t n, double clip_low,
                     double clip_high, double denominator, int64_t num_threads) {
  const int64_t kept = count(mask, n);
  const double scale = mean_scale(denominator, kept);
  const double lowest = 1 - clip_low, highest = 1 + clip_high;
  Slots losses(0), clips(0), kls(0), ratios(0), highs(-INFINITY), lows(-INFINITY);
  for_elements(n, num_threads, [&](int64_t i, int size, int64_t chunk) FASTRLHF_LAMBDA {
    const Bits counts = load_mask(mask, i, size);
    const Vec log_ratio =
        select(counts, load(logprobs + i, size) - load(old_logprobs + i, size), all(0));
    const Vec advantage = select(counts, load(advantages + i, size), all(0));
    const Vec ratio = exp_lanes(log_ratio);
    const Vec bounded =
        select(ratio < lowest, all(lowest), select(ratio > highest, all(highest), ratio));
    const Vec plain = -advantage * ratio, clipped = -advantage * bounded;
    const Bits clips_here = clipped > plain;
    store(grad + i, select(clips_here, all(0), plain * scale), size);
    losses.of[chunk] += select(clips_here, clipped, plain);
    clips.of[chunk] += select(clips_here, all(1), all(0));
    kls.of[chunk] += exp_minus_linear(log_ratio, ratio);
    ratios.of[chunk] += select(counts, ratio, all(0));
    highs.of[chunk] = larger(highs.of[chunk], select(counts, ratio, all(-INFINITY)));
    lows.of[chunk] = larger(lows.of[chunk], select(counts, -ratio, all(-INFINITY)));
  });
  const double sum_ratio = ratios.sum();
  const double nan = isnan(sum_ratio) ? NAN : 0.0;  // a comparison loses a NaN, a sum does not
  *loss = static_cast<T>(losses.sum() * scale);
  stats[0] = static_cast<T>(clips.sum() * scale);
  stats[1] = static_cast<T>(kls.sum() * scale);
  stats[2] = static_cast<T>(sum_ratio * scale);
  stats[3] = static_cast<T>(kept > 0 ? highs.max() + nan : 0.0);
  stats[4] = static_cast<T>(kept > 0 ? -lows.max() + nan : 0.0);
}

FASTRLHF_KERNEL(ppo_policy_loss_float32, ppo_policy_loss<float>)
FASTRLHF_KERNEL(ppo_policy_loss_float64, ppo_policy_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
