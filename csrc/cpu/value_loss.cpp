// The clipped squared error of PPO's value function with its statistics and its gradient, in one
// pass.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// loss = sum max((V - R)^2, (clip(V, old - c, old + c) - R)^2) / (2 denominator); stats = (clip
// fraction, mean (V - R)^2); grad = d loss / d values. A denominator of 0 stands for the number of
// tokens that count, an infinite clip_range for no clipping.
template <class T>
void value_loss(const T* values, const T* old_values, const T* returns, const bool* mask, T* loss,
                T* stats, T* grad, int64_t n, double clip_range, double denominator,
                int64_t num_threads) {
  const int64_t kept = count(mask, n);
  const double scale = mean_scale(denominator, kept);
  const bool clipping = isfinite(clip_range);
  Slots losses(0), clips(0), errors(0);
  for_elements(n, num_threads, [&](int64_t i, int size, int64_t chunk) FASTRLHF_LAMBDA {
    const Bits counts = load_mask(mask, i, size);
    const Vec value = select(counts, load(values + i, size), all(0));
    const Vec old_value = clipping ? select(counts, load(old_values + i, size), all(0)) : all(0);
    const Vec target = select(counts, load(returns + i, size), all(0));
    const Vec lowest = old_value - clip_range, highest = old_value + clip_range;
    const Vec bounded = select(value > lowest, select(value < highest, value, highest), lowest);
    const Vec error = value - target, bounded_error = bounded - target;
    const Vec plain = error * error, clipped = bounded_error * bounded_error;
    // a NaN of old_value is in `clipped` alone, any other is in `plain`: both must reach the loss
    const Bits clips_here = ~(clipped <= plain) & (plain == plain);
    store(grad + i, select(clips_here, all(0), error * scale), size);
    losses.of[chunk] += select(clips_here, clipped, plain);
    clips.of[chunk] += select(clips_here, all(1), all(0));
    errors.of[chunk] += plain;
  });
  *loss = static_cast<T>(0.5 * losses.sum() * scale);
  stats[0] = static_cast<T>(clips.sum() * scale);
  stats[1] = static_cast<T>(errors.sum() * scale);
}

FASTRLHF_KERNEL(value_loss_float32, value_loss<float>)
FASTRLHF_KERNEL(value_loss_float64, value_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
