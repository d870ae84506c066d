// The losses of a reward model on rankings, with their statistics and their gradient.
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
    // equal ones may both be -inf, whose difference is no number
    sum = s > top ? sum * exp(top - s) + 1 : sum + (s == top ? 1 : exp(s - top));
    tops[i] = top = s > top ? s : top;
    sums[i] = sum;
  }
  int64_t last = k - 1;  // the first of those who have no rivals but each other
  while (last > 0 && ties && ties[last]) last--;
  if (tops[last] == -INFINITY) scale = NAN;  // none of them could ever be drawn
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

// Sums over pairs.
struct Pairs {
  double loss = 0, right = 0, margins = 0;
};

// Over the pairs of a group: -log sigmoid(s_i - s_j), a tie being half a win of each, where `slopes`
// are given, to which the gradient times scale is added; how many stand in the right order, half for
// equal scores or ranks; and their margins. For each i a vector of j at a time.
template <class T>
Pairs over_pairs(const T* scores, const bool* ties, T* slopes, int64_t k, T scale) {
  typedef Lanes<T> V;
  constexpr int64_t kOften = 64 * kLanesOf<V>;  // pairs after which the sums go on in double
  const V zero = {}, half = all<V>(0.5), one = all<V>(1);
  V loss = {}, right = {}, margins = {};
  Pairs pairs;
  int64_t since = 0;
  for (int64_t i = 0, tied = 0; i < k; i++) {
    tied = tied > i ? tied : i + 1;
    while (ties && tied < k && ties[tied]) tied++;  // the first whose rank is not that of i
    V slope_of_i = {};
    for_lanes<V>(i + 1, k, [&](int64_t j, int size) FASTRLHF_LAMBDA {
      const BitsOf<V> inside = load_mask<V>(nullptr, 0, size);
      const BitsOf<V> level = load_mask<V>(nullptr, 0, static_cast<int>(tied - j));
      const V h = select(inside, scores[i] - load<V>(scores + j, size), zero);
      if (slopes) {
        const BitsOf<V> up = h > 0;
        const V win = select(level, half, one), lose = 1 - win;
        const V e = exp_lanes(-absolute(h)), large = 1 / (1 + e), small = e * large;
        loss += select(inside, log1p_lanes(e) + select(up, lose * h, -win * h), zero);
        const V slope = select(up, lose * large - win * small, lose * small - win * large);
        const V step = select(inside, slope * scale, zero);
        slope_of_i += step;
        store(slopes + j, load<V>(slopes + j, size) - step, size);
      }
      const V margin = select(level, zero, one) * h;
      margins += margin;
      const V won = select(margin > 0, one, select(margin < 0, zero, half + 0 * margin));  // NaN stays
      right += select(inside, won, zero);
    });
    if (slopes) slopes[i] += static_cast<T>(sum_lanes(slope_of_i));
    since += k - i;
    if (since > kOften || i == k - 1) {
      pairs.loss += sum_lanes(loss);
      pairs.right += sum_lanes(right);
      pairs.margins += sum_lanes(margins);
      loss = right = margins = zero;
      since = 0;
    }
  }
  return pairs;
}

// What a group gives to the loss, and to the statistics of its pairs, of which each weighs `share`.
template <class T>
Pairs add_group(Group<const T> scores, const bool* ties, Group<T> grad, double* scratch, int64_t k,
                int64_t kind, double scale) {
  const double share = 2 / (static_cast<double>(k) * (k - 1));
  double loss = 0;
  if (kind == 0) loss = plackett_luce(scores, ties, grad, scratch, scratch + k, k, scale);
  T *row = reinterpret_cast<T*>(scratch), *slopes = row + k;
  for (int64_t i = 0; i < k; i++) {
    row[i] = scores[i];
    slopes[i] = 0;
  }
  Pairs pairs = over_pairs(row, ties, kind ? slopes : nullptr, k, static_cast<T>(share * scale));
  for (int64_t i = 0; kind && i < k; i++) grad[i] = slopes[i];
  return {kind ? pairs.loss * share : loss, pairs.right * share, pairs.margins * share};
}

// kind 0 is Plackett-Luce, 1 pairwise; scratch has room for two doubles a score. A denominator of 0
// stands for the number of groups of two and more. With rows, response i has scores[rows[i]], and
// the caller has zeroed the gradients of the others.
template <class T>
void ranking_loss(const T* scores, const int32_t* cu_groups, const int64_t* rows, const bool* ties,
                  T* loss, T* stats, T* grad, double* scratch, int64_t num_groups, int64_t kind,
                  double denominator, int64_t num_threads) {
  int64_t kept = 0;
  for (int64_t n = 0; n < num_groups; n++) kept += cu_groups[n + 1] - cu_groups[n] > 1;
  const double scale = mean_scale(denominator, kept);
  const int64_t size = num_groups / kChunks + 1;
  Pairs chunks[kChunks];
  on_threads(cu_groups[num_groups] > kWorthThreads / 16, num_threads, [=, &chunks]() FASTRLHF_ONCE {
#pragma omp for
    for (int64_t c = 0; c < kChunks; c++) {
      const int64_t last = (c + 1) * size < num_groups ? (c + 1) * size : num_groups;
      for (int64_t n = c * size; n < last; n++) {
        const int64_t start = cu_groups[n], k = cu_groups[n + 1] - start;
        const Group<T> group_grad(grad, rows, start);
        if (k == 1) group_grad[0] = 0;
        if (k < 2) continue;
        const Pairs found = add_group(Group<const T>(scores, rows, start), ties ? ties + start : ties,
                                      group_grad, scratch + 2 * start, k, kind, scale);
        chunks[c].loss += found.loss;
        chunks[c].right += found.right;
        chunks[c].margins += found.margins;
      }
    }
  });
  Pairs sums;
  for (const Pairs& chunk : chunks) {
    sums.loss += chunk.loss;
    sums.right += chunk.right;
    sums.margins += chunk.margins;
  }
  *loss = static_cast<T>(sums.loss * scale);
  stats[0] = static_cast<T>(sums.right * scale);
  stats[1] = static_cast<T>(sums.margins * scale);
}

FASTRLHF_KERNEL(ranking_loss_float32, ranking_loss<float>)
FASTRLHF_KERNEL(ranking_loss_float64, ranking_loss<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
