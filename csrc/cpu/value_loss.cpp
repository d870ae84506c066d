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
  typedef Lanes<T> V;
  const int64_t kept = count(mask, n);
  const double scale = mean_scale(denominator, kept);
  const bool clipping = isfinite(clip_range);
  const V range = all<V>(clip_range), weight = all<V>(scale);
  Slots losses(0), clips(0), errors(0);
  for_pieces(
      n, num_threads,
      [=, &losses, &clips, &errors](int64_t begin, int64_t end, int64_t chunk) FASTRLHF_LAMBDA {
        V sum_losses = {}, sum_clips = {}, sum_errors = {};
        for_lanes<V>(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
          const BitsOf<V> counts = load_mask<V>(mask, i, size);
          const V value = select(counts, load<V>(values + i, size), all<V>(0));
          const V old_value =
              clipping ? select(counts, load<V>(old_values + i, size), all<V>(0)) : all<V>(0);
          const V target = select(counts, load<V>(returns + i, size), all<V>(0));
          const V lowest = old_value - range, highest = old_value + range;
          const V bounded = select(value > lowest, select(value < highest, value, highest), lowest);
          const V error = value - target, bounded_error = bounded - target;
          const V plain = error * error, clipped = bounded_error * bounded_error;
          // a NaN of old_value is in `clipped` alone, any other is in `plain`: both must reach the
          // loss
          const BitsOf<V> clips_here = ~(clipped <= plain) & (plain == plain);
          store(grad + i, select(clips_here, all<V>(0), error * weight), size);
          sum_losses += select(clips_here, clipped, plain);
          sum_clips += select(clips_here, all<V>(1), all<V>(0));
          sum_errors += plain;
        });
        losses.of[chunk] += sum_lanes(sum_losses);
        clips.of[chunk] += sum_lanes(sum_clips);
        errors.of[chunk] += sum_lanes(sum_errors);
      });
  *loss = static_cast<T>(0.5 * losses.sum() * scale);
  stats[0] = static_cast<T>(clips.sum() * scale);
  stats[1] = static_cast<T>(errors.sum() * scale);
}

FASTRLHF_KERNEL(value_loss_float32, value_loss<float>)
FASTRLHF_KERNEL(value_loss_float64, value_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
