// Small matrix products in registers, for attention: C (+)= A B, where B's rows are whole vectors.
#pragma once
#include <stdint.h>

#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// A block of C is kRows x kVectors vectors, which with those of B fill the registers.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// Columns that lie together, so that a product reads them in order.
template <class T>
constexpr int64_t kPanel = kVectors * kLanesOf<Lanes<T>>;

static FASTRLHF_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Row t of `to` is the head's part of row row_of(t) of `from`, followed by 0s; so are rows up to a
// whole block.
template <class T, class RowOf>
static FASTRLHF_INLINE void gather(const T* from, int64_t row_size, int64_t width, int64_t count,
                                   T* to, int64_t wide, const RowOf& row_of) {
  for (int64_t t = 0; t < round_up(count, kRows); t++) {
    T* row = to + t * wide;
    if (t < count) memcpy(row, from + row_of(t) * row_size, width * sizeof(T));
    const int64_t first = t < count ? width : 0;
    memset(row + first, 0, (wide - first) * sizeof(T));
  }
}

// Rows (count, wide) as columns, in panels of `panel` of them: [panel][wide][panel].
template <class T>
static FASTRLHF_ONCE void transpose(const T* rows, int64_t count, int64_t wide, T* to) {
  constexpr int64_t panel = kPanel<T>;
  for (int64_t start = 0; start < count; start += panel)
    for (int64_t d = 0; d < wide; d++)
      for (int64_t t = 0; t < panel; t++)
        to[start * wide + d * panel + t] = start + t < count ? rows[(start + t) * wide + d] : T(0);
}

// c[r] (+)= sum over p < n of a[r][p a_step] b[p], for kRows rows of N vectors.
template <bool add, int N, class T>
static FASTRLHF_INLINE void block_product(const T* const* a, int64_t a_step, const T* b,
                                          int64_t b_step, int64_t n, T* c, int64_t c_step) {
  typedef Lanes<T> V;
  constexpr int lanes = kLanesOf<V>;
  V sums[kRows][N];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++)
      sums[r][j] = add ? load<V>(c + r * c_step + j * lanes, lanes) : all<V>(0);
  for (int64_t p = 0; p < n; p++) {
    V row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) row[j] = load<V>(b + p * b_step + j * lanes, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const T factor = a[r][p * a_step];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sums[r][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(c + r * c_step + j * lanes, sums[r][j], lanes);
}

// C (+)= A B for num_rows rows, in whole blocks of kRows, of num_vectors vectors.
// A[r][p] is a[r a_row + p a_step].
template <bool add, class T>
static FASTRLHF_ONCE void product(const T* a, int64_t a_row, int64_t a_step, const T* b,
                                  int64_t b_step, int64_t n, T* c, int64_t c_step, int64_t num_rows,
                                  int64_t num_vectors) {
  constexpr int lanes = kLanesOf<Lanes<T>>;
  for (int64_t r = 0; r < num_rows; r += kRows) {
    const T* rows[kRows];
    for (int k = 0; k < kRows; k++) rows[k] = a + (r + k) * a_row;
    T* to = c + r * c_step;
    int64_t j = 0;
    for (; j + kVectors <= num_vectors; j += kVectors)
      block_product<add, kVectors>(rows, a_step, b + j * lanes, b_step, n, to + j * lanes, c_step);
    if (kVectors > 2 && j + 2 <= num_vectors) {
      block_product<add, 2>(rows, a_step, b + j * lanes, b_step, n, to + j * lanes, c_step);
      j += 2;
    }
    if (j < num_vectors)
      block_product<add, 1>(rows, a_step, b + j * lanes, b_step, n, to + j * lanes, c_step);
  }
}

}  // namespace
}  // namespace FASTRLHF_ISA
