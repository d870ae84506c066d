// The recurrence x_t += decay x_{t+1} in each segment of a packed batch.
#pragma once
#include <stdint.h>

namespace FASTRLHF_ISA {
namespace {

// Segments that one thread scans side by side: each waits for its own previous sum, so alone it
// leaves the core idle.
constexpr int kGroup = 4;

// In place, from the end of each of `num` <= kGroup segments to its start.
template <class T>
static inline void scan_group(T* __restrict__ x, const int32_t* cu_seqlens, int num, T decay) {
  int64_t length[kGroup] = {}, shortest = INT64_MAX;
  T* end[kGroup];
  for (int j = 0; j < num; j++) {
    end[j] = x + cu_seqlens[j + 1];
    length[j] = static_cast<int64_t>(cu_seqlens[j + 1]) - cu_seqlens[j];
    shortest = length[j] < shortest ? length[j] : shortest;
  }
  T sum[kGroup] = {};
  int64_t k = 0;
  if (num == kGroup)
    for (; k < shortest; k++)
      for (int j = 0; j < kGroup; j++) end[j][-1 - k] = sum[j] = end[j][-1 - k] + decay * sum[j];
  for (int j = 0; j < num; j++)
    for (int64_t rest = k; rest < length[j]; rest++)
      end[j][-1 - rest] = sum[j] = end[j][-1 - rest] + decay * sum[j];
}

}  // namespace
}  // namespace FASTRLHF_ISA
