// The Bradley-Terry loss of a reward model with its statistics and its gradients, the scores
// gathered from wherever they stand: one launch of one block, as an optimizer step has few pairs.
#include "kernel.h"
#include "launch.h"
#include "moments.cuh"
#include "pair.cuh"

namespace FASTRLHF_ISA {
namespace {

constexpr int kThreads = 512;

struct Sums {
  double loss, accuracy, margin, chosen, rejected;
};

__device__ inline Sums merged(const Sums& a, const Sums& b) {
  return {a.loss + b.loss, a.accuracy + b.accuracy, a.margin + b.margin, a.chosen + b.chosen,
          a.rejected + b.rejected};
}

// See csrc/cpu/pairwise_reward_loss.cpp for the formula.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    all_pairs(Gathered<T> chosen, Gathered<T> rejected, const T* margin, const T* targets,
              const T* weights, T* loss, T* stats, int64_t n, double smoothing, double center,
              double scale) {
  Sums sums = {};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const double c = chosen.score(i), r = rejected.score(i);
    const double m = margin ? margin[i] : T(0), w = weights ? weights[i] : T(1);
    const double target = targets ? targets[i] : T(1);
    const PairLoss pair = pair_loss(c - r - m, (1 - smoothing) * target + smoothing * (1 - target));
    const double pull = 2 * center * (c + r);
    chosen.set_grad(i, w * (pull + pair.slope) * scale);
    rejected.set_grad(i, w * (pull - pair.slope) * scale);
    sums = merged(sums,
                  {w * (pair.loss + center * (c + r) * (c + r)), right_order(c - r), c - r, c, r});
  }
  const Sums total = merged_over_block(sums);
  if (threadIdx.x != 0) return;
  *loss = static_cast<T>(total.loss * scale);
  stats[0] = static_cast<T>(total.accuracy * scale);
  stats[1] = static_cast<T>(total.margin * scale);
  stats[2] = static_cast<T>(total.chosen * scale);
  stats[3] = static_cast<T>(total.rejected * scale);
}

// The gradients are those of the gathered scores; the caller has zeroed the others. A denominator
// of 0 stands for n.
template <class T>
void pairwise_reward_loss(const T* chosen, const T* rejected, const int64_t* chosen_rows,
                          const int64_t* rejected_rows, const T* margin, const T* targets,
                          const T* weights, T* loss, T* stats, T* grad_chosen, T* grad_rejected,
                          int64_t num_chosen, int64_t num_rejected, int64_t n, double smoothing,
                          double center, double denominator, cudaStream_t stream) {
  const double count = denominator > 0 ? denominator : n > 0 ? static_cast<double>(n) : 1.0;
  const Gathered<T> of_chosen = {chosen, chosen_rows, grad_chosen, num_chosen};
  const Gathered<T> of_rejected = {rejected, rejected_rows, grad_rejected, num_rejected};
  FASTRLHF_LAUNCH(all_pairs<T>, 1, kThreads, stream, of_chosen, of_rejected, margin, targets,
                  weights, loss, stats, n, smoothing, center, 1 / count);
}

FASTRLHF_KERNEL(pairwise_reward_loss_float32, pairwise_reward_loss<float>)
FASTRLHF_KERNEL(pairwise_reward_loss_float64, pairwise_reward_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
