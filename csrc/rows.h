// What kernels on the rows of a matrix of logits share: blocks of columns in the type that is
// computed in.
#pragma once
#include <math.h>
#include <stdint.h>

#include "half.h"
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// Columns whose maximum is found, and which are then still in the L1 cache. Their sums are kept in
// vectors: 64 floats a lane, so that rounding is alike in all instruction sets, before a sum goes on
// in double.
constexpr int64_t BLOCK = 64 * kLanesOf<Lanes<float>>;

template <class In>
using Wide = decltype(load(In()));

// Returns a block of at most BLOCK columns in the type that is computed in, followed by -inf up to
// whole vectors: the block itself, or a copy in `buffer`.
template <class In>
inline const Wide<In>* widen(const In* block, Wide<In>* buffer, int64_t size) {
  constexpr int64_t lanes = kLanesOf<Lanes<Wide<In>>>;
  if constexpr (std::is_same_v<In, Wide<In>>) {
    if (size % lanes == 0) return block;
  }
#pragma omp simd
  for (int64_t v = 0; v < size; v++) buffer[v] = load(block[v]);
  for (int64_t v = size; v % lanes != 0; v++) buffer[v] = -INFINITY;
  return buffer;
}

// A whole vector of such a block.
template <class T>
static FASTRLHF_INLINE Lanes<T> lanes_at(const T* x) {
  return load<Lanes<T>>(x, kLanesOf<Lanes<T>>);
}

// As `load` and `store` of numeric.h, of half precision too: `size` elements, in the type that is
// computed in.
template <class In>
static FASTRLHF_INLINE Lanes<Wide<In>> wide_lanes(const In* x, int size) {
  using V = Lanes<Wide<In>>;
  if constexpr (std::is_same_v<In, Wide<In>>) {
    return load<V>(x, size);
  } else {
    Wide<In> buffer[kLanesOf<V>] = {};
#pragma omp simd
    for (int k = 0; k < size; k++) buffer[k] = load(x[k]);
    return lanes_at(buffer);
  }
}
template <class V, class Out>
static FASTRLHF_INLINE void store_wide(Out* to, V v, int size) {
  if constexpr (std::is_same_v<Out, ElementOf<V>>) {
    store(to, v, size);
  } else {
    ElementOf<V> buffer[kLanesOf<V>];
    memcpy(buffer, &v, sizeof v);
#pragma omp simd
    for (int k = 0; k < size; k++) store(to + k, buffer[k]);
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
