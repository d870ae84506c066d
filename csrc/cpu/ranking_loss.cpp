// The losses of a reward model on rankings, with their statistics and their gradient. Groups are
// small and few: plain loops.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// Scores or gradients of a group, which stand one after another or, with rows, anywhere.
template <class T>
struct Group {
  T* all;
  const int64_t* rows;
  Group(T* x, const int64_t* x_rows, int64_t start)
      : all(x_rows ? x : x + start), rows(x_rows ? x_rows + start : nullptr) {}
  T& operator[](int64_t i) const { return all[rows ? rows[i] : i]; }
};

// The sum of log(sum of e^s over the rivals of i) - s_i over the k scores of a group, which are in
// rank order; rivals of i are those that are not better. Writes the gradient times scale. The sum
// over the rivals is kept as sums[i] e^tops[i], tops[i] being the largest: an exponent is always
// the difference of two scores, so their level costs no precision.
template <class T>
double plackett_luce(Group<const T> scores, const bool* ties, Group<T> grad, double* tops,
                     double* sums, int64_t k, double scale) {
  double top = scores[k - 1], sum = 0;
  for (int64_t i = k - 1; i >= 0; i--) {
    const double s = scores[i];
    sum = s > top ? sum * exp(top - s) + 1 : sum + exp(s - top);
    tops[i] = top = s > top ? s : top;
    sums[i] = sum;
  }
  // share: sum of e^top / (sums[j] e^tops[j]) over who has i as a rival
  double loss = 0, share = 0;
  for (int64_t i = 0, end = 0; i < k; i++) {
    if (i == end) {
      share *= exp(tops[i] - top);
      top = tops[i];
      sum = sums[i];
      do share += 1 / sum;
      while (++end < k && ties && ties[end]);
    }
    loss += log(sum) + (top - scores[i]);
    grad[i] = static_cast<T>((exp(scores[i] - top) * share - 1) * scale);
  }
  return loss;
}

// The mean over pairs of -log sigmoid(s_i - s_j), a tie being half a win of each. Adds the gradient
// times scale to `slopes`.
template <class T>
double pairwise(Group<const T> scores, const bool* ties, double* slopes, int64_t k, double scale) {
  const double share = 2 / (static_cast<double>(k) * (k - 1));
  double loss = 0;
  for (int64_t i = 0; i < k; i++) {
    bool tied = true;
    for (int64_t j = i + 1; j < k; j++) {
      tied = tied && ties && ties[j];
      const double h = static_cast<double>(scores[i]) - scores[j], e = exp(-fabs(h));
      const double win = tied ? 0.5 : 1.0, small = e / (1 + e), large = 1 / (1 + e);
      loss += log1p(e) + (h > 0 ? (1 - win) * h : -win * h);
      const double slope = (1 - win) * (h > 0 ? large : small) - win * (h > 0 ? small : large);
      slopes[i] += slope * share * scale;
      slopes[j] -= slope * share * scale;
    }
  }
  return loss * share;
}

// How many pairs stand in the right order, half for equal scores or ranks, and the sum of their
// margins.
template <class T>
void count_pairs(Group<const T> scores, const bool* ties, int64_t k, double* right,
                 double* margins) {
  for (int64_t i = 0; i < k; i++) {
    bool tied = true;
    for (int64_t j = i + 1; j < k; j++) {
      tied = tied && ties && ties[j];
      const double margin = (tied ? 0 : 1) * (static_cast<double>(scores[i]) - scores[j]);
      *right += isnan(margin) ? NAN : margin > 0 ? 1.0 : margin == 0 ? 0.5 : 0.0;
      *margins += margin;
    }
  }
}

// kind 0 is Plackett-Luce, 1 pairwise; scratch has room for two doubles a score. A denominator of 0
// stands for the number of groups of two and more. With rows, response i has scores[rows[i]], and
// the caller has zeroed the gradients of the others.
template <class T>
void ranking_loss(const T* scores, const int32_t* cu_groups, const int64_t* rows, const bool* ties,
                  T* loss, T* stats, T* grad, double* scratch, int64_t num_groups, int64_t kind,
                  double denominator) {
  int64_t kept = 0;
  for (int64_t n = 0; n < num_groups; n++) kept += cu_groups[n + 1] - cu_groups[n] > 1;
  const double scale = mean_scale(denominator, kept);
  double sum_loss = 0, accuracy = 0, margin = 0;
  for (int64_t n = 0; n < num_groups; n++) {
    const int64_t start = cu_groups[n], k = cu_groups[n + 1] - start;
    const bool* tie = ties ? ties + start : nullptr;
    const Group<const T> group(scores, rows, start);
    const Group<T> group_grad(grad, rows, start);
    if (k < 2) {
      if (k == 1) group_grad[0] = 0;
      continue;
    }
    if (kind == 0) {
      sum_loss += plackett_luce(group, tie, group_grad, scratch, scratch + k, k, scale);
    } else {
      for (int64_t i = 0; i < k; i++) scratch[i] = 0;
      sum_loss += pairwise(group, tie, scratch, k, scale);
      for (int64_t i = 0; i < k; i++) group_grad[i] = static_cast<T>(scratch[i]);
    }
    double right = 0, margins = 0;
    count_pairs(group, tie, k, &right, &margins);
    accuracy += 2 * right / (static_cast<double>(k) * (k - 1));
    margin += 2 * margins / (static_cast<double>(k) * (k - 1));
  }
  *loss = static_cast<T>(sum_loss * scale);
  stats[0] = static_cast<T>(accuracy * scale);
  stats[1] = static_cast<T>(margin * scale);
}

FASTRLHF_KERNEL(ranking_loss_float32, ranking_loss<float>)
FASTRLHF_KERNEL(ranking_loss_float64, ranking_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
