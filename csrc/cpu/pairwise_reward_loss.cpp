// The Bradley-Terry loss of a reward model with its statistics and its gradients, in one pass.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// Elements i to i + size, or with rows those of rows[i] on.
template <class T>
static FASTRLHF_INLINE Vec take(const T* p, const int64_t* rows, int64_t i, int size) {
  if (!rows) return load(p + i, size);
  Vec v = {};
  for (int k = 0; k < size; k++) v[k] = p[rows[i + k]];
  return v;
}
template <class T>
static FASTRLHF_INLINE void put(T* p, const int64_t* rows, int64_t i, Vec v, int size) {
  if (!rows) return store(p + i, v, size);
  for (int k = 0; k < size; k++) p[rows[i + k]] = static_cast<T>(v[k]);
}

// With h = c - r - margin, p = (1 - smoothing) target + smoothing (1 - target) and weight w:
// loss = sum w (p softplus(-h) + (1 - p) softplus(h) + center (c + r)^2) / denominator;
// stats = (accuracy, c - r, c, r), not weighted. A denominator of 0 stands for n. With rows, c of
// pair i is chosen[chosen_rows[i]], and the caller has zeroed the gradients of the others; r
// likewise.
template <class T>
void pairwise_reward_loss(const T* chosen, const T* rejected, const int64_t* chosen_rows,
                          const int64_t* rejected_rows, const T* margin, const T* targets,
                          const T* weights, T* loss, T* stats, T* grad_chosen, T* grad_rejected,
                          int64_t n, double smoothing, double center, double denominator,
                          int64_t num_threads) {
  const double scale = mean_scale(denominator, n);
  Slots losses(0), right(0), margins(0), sum_chosen(0), sum_rejected(0);
  const auto piece = [=, &losses, &right, &margins, &sum_chosen, &sum_rejected](
                         int64_t begin, int64_t end, int64_t chunk) FASTRLHF_LAMBDA {
    Vec loss_here = {}, right_here = {}, margin_here = {}, chosen_here = {}, rejected_here = {};
    for_lanes(begin, end, [&](int64_t i, int size) FASTRLHF_LAMBDA {
      const Vec there = select(load_mask(nullptr, i, size), all(1), all(0));
      const Vec c = take(chosen, chosen_rows, i, size), r = take(rejected, rejected_rows, i, size);
      const Vec d = c - r, h = margin ? d - load(margin + i, size) : d;
      const Vec target = targets ? load(targets + i, size) : all(1);
      const Vec w = weights ? load(weights + i, size) : there;
      const Vec p = (1 - smoothing) * target + smoothing * (1 - target);
      // softplus(h) = max(h, 0) + log(1 + e), and sigmoid to full relative accuracy on both sides
      const Vec e = exp_lanes(-absolute(h)), large = 1 / (1 + e), small = e * large;
      const Vec entropy = select(h > 0, (1 - p) * h, -p * h) + log1p_lanes(e);
      const Vec slope = select(h > 0, (1 - p) * large - p * small, (1 - p) * small - p * large);
      const Vec total = c + r, pull = 2 * center * total;
      put(grad_chosen, chosen_rows, i, w * (slope + pull) * scale, size);
      put(grad_rejected, rejected_rows, i, w * (pull - slope) * scale, size);
      loss_here += w * (entropy + center * total * total);
      const Vec wins = select(d > 0, all(1), select(d < 0, all(0), 0.5 + 0 * d));  // NaN stays
      right_here += there * wins;
      margin_here += d;
      chosen_here += c;
      rejected_here += r;
    });
    losses.of[chunk] += sum_lanes(loss_here);
    right.of[chunk] += sum_lanes(right_here);
    margins.of[chunk] += sum_lanes(margin_here);
    sum_chosen.of[chunk] += sum_lanes(chosen_here);
    sum_rejected.of[chunk] += sum_lanes(rejected_here);
  };
  for_pieces(n, num_threads, piece);
  *loss = static_cast<T>(losses.sum() * scale);
  stats[0] = static_cast<T>(right.sum() * scale);
  stats[1] = static_cast<T>(margins.sum() * scale);
  stats[2] = static_cast<T>(sum_chosen.sum() * scale);
  stats[3] = static_cast<T>(sum_rejected.sum() * scale);
}

FASTRLHF_KERNEL(pairwise_reward_loss_float32, pairwise_reward_loss<float>)
FASTRLHF_KERNEL(pairwise_reward_loss_float64, pairwise_reward_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
