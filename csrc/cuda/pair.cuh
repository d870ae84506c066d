// The loss of one pair of scores, which pairs and rankings share.
#pragma once
#include <math.h>

namespace FASTRLHF_ISA {
namespace {

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
