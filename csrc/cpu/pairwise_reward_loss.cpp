// The Bradley-Terry loss of a reward model with its statistics and its gradients, in one pass.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

static inline double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(-fabs(x))); }

// 1 / (1 + e^-x), to full relative accuracy on both sides
static inline double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

// With h = c - r - margin, p = (1 - smoothing) target + smoothing (1 - target) and weight w:
// loss = sum w (p softplus(-h) + (1 - p) softplus(h) + center (c + r)^2) / denominator;
// stats = (accuracy, c - r, c, r), not weighted. A denominator of 0 stands for n. With rows, c of
// pair i is chosen[chosen_rows[i]], and the caller has zeroed the gradients of the others; r
// likewise. There are few pairs: plain loops.
template <class T>
void pairwise_reward_loss(const T* chosen, const T* rejected, const int64_t* chosen_rows,
                          const int64_t* rejected_rows, const T* margin, const T* targets,
                          const T* weights, T* loss, T* stats, T* grad_chosen, T* grad_rejected,
                          int64_t n, double smoothing, double center, double denominator) {
  const double scale = mean_scale(denominator, n);
  double sum_loss = 0, sum_accuracy = 0, sum_margin = 0, sum_chosen = 0, sum_rejected = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t c_row = chosen_rows ? chosen_rows[i] : i;
    const int64_t r_row = rejected_rows ? rejected_rows[i] : i;
    const double c = chosen[c_row], r = rejected[r_row], m = margin ? margin[i] : T(0),
                 h = c - r - m;
    const double target = targets ? targets[i] : T(1), w = weights ? weights[i] : T(1);
    const double p = (1 - smoothing) * target + smoothing * (1 - target);
    const double slope = (1 - p) * sigmoid(h) - p * sigmoid(-h), pull = 2 * center * (c + r);
    grad_chosen[c_row] = static_cast<T>(w * (slope + pull) * scale);
    grad_rejected[r_row] = static_cast<T>(w * (pull - slope) * scale);
    sum_loss += w * (p * softplus(-h) + (1 - p) * softplus(h) + center * (c + r) * (c + r));
    sum_accuracy += isnan(c - r) ? NAN : c > r ? 1.0 : c == r ? 0.5 : 0.0;
    sum_margin += c - r;
    sum_chosen += c;
    sum_rejected += r;
  }
  *loss = static_cast<T>(sum_loss * scale);
  stats[0] = static_cast<T>(sum_accuracy * scale);
  stats[1] = static_cast<T>(sum_margin * scale);
  stats[2] = static_cast<T>(sum_chosen * scale);
  stats[3] = static_cast<T>(sum_rejected * scale);
}

FASTRLHF_KERNEL(pairwise_reward_loss_float32, pairwise_reward_loss<float>)
FASTRLHF_KERNEL(pairwise_reward_loss_float64, pairwise_reward_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
