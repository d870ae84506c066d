// The losses of a reward model on rankings with their statistics and their gradient, the scores
// gathered from wherever they stand: one launch of one block, as an optimizer step has few groups,
// and a warp a group, whose lanes each look at all other responses.
#include "kernel.h"
#include "launch.h"
#include "moments.cuh"
#include "pair.cuh"

namespace FASTRLHF_ISA {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

struct Sums {
  double loss, accuracy, margin, groups;
};

__device__ inline Sums merged(const Sums& a, const Sums& b) {
  return {a.loss + b.loss, a.accuracy + b.accuracy, a.margin + b.margin, a.groups + b.groups};
}

// The k responses from `begin`, in rank order; ties: which rank the same as the one before.
template <class T>
struct Group {
  Gathered<T> all;
  const bool* ties;
  int64_t begin, k;

  __device__ double score(int64_t i) const { return all.score(begin + i); }
  __device__ void set_grad(int64_t i, double x) const { all.set_grad(begin + i, x); }
  __device__ bool tied(int64_t i) const { return ties && ties[begin + i]; }
  __device__ double pairs() const { return 0.5 * static_cast<double>(k) * (k - 1); }
};

// This lane's part of log(sum of e^s over the rivals of i) - s_i, summed over i; rivals of i are
// those that are not better. The sum over the rivals is kept as sums[i] e^tops[i], tops[i] being
// the largest: an exponent is always the difference of two scores, so their level costs no
// precision. All lanes of a warp call this together.
template <class T>
__device__ double plackett_luce(const Group<T>& group, double* tops, double* sums, double scale) {
  const int lane = threadIdx.x % 32;
  double loss = 0;
  for (int64_t i = lane; i < group.k; i += 32) {
    int64_t first = i;
    while (first > 0 && group.tied(first)) first--;
    double top = group.score(first), sum = 0;
    for (int64_t j = first + 1; j < group.k; j++) top = group.score(j) > top ? group.score(j) : top;
    for (int64_t j = first; j < group.k; j++) sum += exp(group.score(j) - top);
    tops[i] = top;
    sums[i] = sum;
    loss += log(sum) + (top - group.score(i));
  }
  __syncwarp();
  if (tops[group.k - 1] == -INFINITY) scale = NAN;  // the last could never be drawn
  for (int64_t i = lane; i < group.k; i += 32) {
    double share = 0;  // of those who have i as a rival
    for (int64_t j = 0; j <= i || (j < group.k && group.tied(j)); j++)
      share += exp(group.score(i) - tops[j]) / sums[j];
    group.set_grad(i, (share - 1) * scale);
  }
  return loss;
}

// This lane's part of the mean over pairs of -log sigmoid(s_i - s_j), a tie being half a win of
// each.
template <class T>
__device__ double pairwise(const Group<T>& group, double scale) {
  const double share = 1 / group.pairs();
  double loss = 0;
  for (int64_t i = threadIdx.x % 32; i < group.k; i += 32) {
    const double own = group.score(i);
    double slope = 0;
    bool tied = true;
    for (int64_t j = i + 1; j < group.k; j++) {
      tied = tied && group.tied(j);
      const PairLoss pair = pair_loss(own - group.score(j), tied ? 0.5 : 1.0);
      loss += pair.loss;
      slope += pair.slope;
    }
    tied = true;
    for (int64_t j = i - 1; j >= 0; j--) {
      tied = tied && group.tied(j + 1);
      slope -= pair_loss(group.score(j) - own, tied ? 0.5 : 1.0).slope;
    }
    group.set_grad(i, slope * share * scale);
  }
  return loss * share;
}

// Adds this lane's part of the means over pairs.
template <class T>
__device__ void add_statistics(const Group<T>& group, Sums& sums) {
  double right = 0, margins = 0;
  for (int64_t i = threadIdx.x % 32; i < group.k; i += 32) {
    bool tied = true;
    for (int64_t j = i + 1; j < group.k; j++) {
      tied = tied && group.tied(j);
      const double margin = (tied ? 0 : 1) * (group.score(i) - group.score(j));
      right += right_order(margin);
      margins += margin;
    }
  }
  sums.accuracy += right / group.pairs();
  sums.margin += margins / group.pairs();
}

template <class T>
__device__ Group<T> group_of(const Gathered<T>& scores, const bool* ties, const int32_t* cu_groups,
                             int64_t g, int64_t n) {
  const int64_t begin = cu_groups[g] < 0 ? 0 : cu_groups[g];
  const int64_t end = cu_groups[g + 1] < n ? cu_groups[g + 1] : n;
  return {scores, ties, begin, end > begin ? end - begin : 0};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    rank(Gathered<T> scores, const int32_t* cu_groups, const bool* ties, T* loss, T* stats,
         double* scratch, int64_t n, int64_t num_groups, int kind, double denominator) {
  Sums sums = {};
  for (int64_t g = threadIdx.x; g < num_groups; g += kThreads)
    sums.groups += group_of(scores, ties, cu_groups, g, n).k > 1;
  const double kept = merged_over_block(sums).groups;
  const double scale = 1 / (denominator > 0 ? denominator : kept > 0 ? kept : 1);
  for (int64_t g = threadIdx.x / 32; g < num_groups; g += kWarps) {
    const Group<T> group = group_of(scores, ties, cu_groups, g, n);
    if (group.k < 2) {
      if (group.k == 1) group.set_grad(0, 0);
      continue;
    }
    double* tops = scratch + 2 * group.begin;
    sums.loss +=
        kind == 0 ? plackett_luce(group, tops, tops + group.k, scale) : pairwise(group, scale);
    add_statistics(group, sums);
  }
  const Sums total = merged_over_block(sums);
  if (threadIdx.x != 0) return;
  *loss = static_cast<T>(total.loss * scale);
  stats[0] = static_cast<T>(total.accuracy * scale);
  stats[1] = static_cast<T>(total.margin * scale);
}

// See csrc/cpu/ranking_loss.cpp; n is the number of responses in groups.
template <class T>
void ranking_loss(const T* scores, const int32_t* cu_groups, const int64_t* rows, const bool* ties,
                  T* loss, T* stats, T* grad, double* scratch, int64_t num_scores, int64_t n,
                  int64_t num_groups, int64_t kind, double denominator, cudaStream_t stream) {
  const Gathered<T> gathered = {scores, rows, grad, num_scores};
  FASTRLHF_LAUNCH(rank<T>, 1, kThreads, stream, gathered, cu_groups, ties, loss, stats, scratch, n,
                  num_groups, static_cast<int>(kind), denominator);
}

FASTRLHF_KERNEL(ranking_loss_float32, ranking_loss<float>)
FASTRLHF_KERNEL(ranking_loss_float64, ranking_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
