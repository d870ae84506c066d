// What kernels on the rows of a matrix of logits share: blocks of columns in the type that is
// computed in.
#pragma once
#include <math.h>
#include <stdint.h>

#include "half.h"
#include "kernel.h"

namespace FASTRLHF_ISA {
namespace {

constexpr int64_t BLOCK =
    1024;  // columns whose maximum is found, and which are then still in the L1 cache

template <class In>
using Wide = decltype(load(In()));

// Returns the block in the type that is computed in: itself, or widened into `buffer`.
template <class In>
inline const Wide<In>* widen(const In* block, Wide<In>* buffer, int64_t size) {
  if constexpr (std::is_same_v<In, Wide<In>>) {
    return block;
  } else {
#pragma omp simd
    for (int64_t v = 0; v < size; v++) buffer[v] = load(block[v]);
    return buffer;
  }
}

template <class T>
inline T highest_of(const T* x, int64_t size) {
  T highest = -INFINITY;  // NaN is passed over here, and comes back in the sum of exponentials
#pragma omp simd reduction(max : highest)
  for (int64_t v = 0; v < size; v++) highest = x[v] > highest ? x[v] : highest;
  return highest;
}

// Waking the other threads takes as long as this many elements.
inline int useful(int64_t num_threads, int64_t num_rows, int64_t size) {
  return num_rows * size < 16384 ? 1 : static_cast<int>(num_threads);
}

}  // namespace
}  // namespace FASTRLHF_ISA
