// What the losses on pairs and on rankings share: the loss of one pair, and scores that stand
// anywhere.
#pragma once
#include <math.h>
#include <stdint.h>

namespace FASTRLHF_ISA {
namespace {

template <class T>
struct Gathered {
  const T* scores;
  const int64_t* rows;  // of each response, or null where response i has score i
  T* grad;
  int64_t num_scores;

  __device__ int64_t row_of(int64_t i) const { return rows ? rows[i] : i; }
  // nobody has looked at the rows before: one that is not there has the score NaN
  __device__ bool has(int64_t row) const { return row >= 0 && row < num_scores; }
  __device__ double score(int64_t i) const {
    return has(row_of(i)) ? scores[row_of(i)] : static_cast<T>(NAN);
  }
  __device__ void set_grad(int64_t i, double x) const {
    if (has(row_of(i))) grad[row_of(i)] = static_cast<T>(x);
  }
};

struct PairLoss {
  double loss, slope;  // slope: by h
};

// -p log sigmoid(h) - (1 - p) log sigmoid(-h), for any finite h
__device__ inline PairLoss pair_loss(double h, double p) {
  const double e = exp(-fabs(h)), small = e / (1 + e), large = 1 / (1 + e);
  return {log1p(e) + (h > 0 ? (1 - p) * h : -p * h),
          (1 - p) * (h > 0 ? large : small) - p * (h > 0 ? small : large)};
}

// 1 for a positive margin, 0.5 for none
__device__ inline double right_order(double margin) {
  return isnan(margin) ? margin : margin > 0 ? 1.0 : margin == 0 ? 0.5 : 0.0;
}

}  // namespace
}  // namespace FASTRLHF_ISA
