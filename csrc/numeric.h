// What the element-wise kernels share: vectors as wide as the instruction set has, an exponential
// and a logarithm, and sums that do not depend on the number of threads. The vectors are GCC's and
// clang's, so one source serves every instruction set. A kernel calculates in vectors of double, or
// where it has more to do than to wait for memory in those of its tensors' type; sums are double.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernel.h"

#define FASTRLHF_INLINE inline __attribute__((always_inline))
#define FASTRLHF_LAMBDA __attribute__((always_inline))
#define FASTRLHF_ONCE __attribute__((noinline))

namespace FASTRLHF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T, int n>
struct VectorOf {
  typedef T Type __attribute__((vector_size(n * sizeof(T))));
};
template <class T>
using Lanes = typename VectorOf<T, kBytes / sizeof(T)>::Type;
static FASTRLHF_INLINE float first_of(float x) { return x; }
static FASTRLHF_INLINE double first_of(double x) { return x; }
template <class V>
static FASTRLHF_INLINE auto first_of(V v) {
  return v[0];
}
template <class V>
using ElementOf = decltype(first_of(V{}));
template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(ElementOf<V>);
template <class V>
using BitsOf = decltype(V{} == V{});  // an integer a lane, or a truth value: 0 or -1

typedef Lanes<double> Vec;
typedef BitsOf<Vec> Bits;
constexpr int kLanes = kLanesOf<Vec>;

template <class V = Vec>
static FASTRLHF_INLINE V all(double x) {
  return static_cast<ElementOf<V>>(x) - V{};
}
template <class V>
static FASTRLHF_INLINE V select(BitsOf<V> which, V yes, V no) {
  return which ? yes : no;
}
template <class V>
static FASTRLHF_INLINE V larger(V a, V b) {
  return select(a < b, b, a);
}
template <class V>
static FASTRLHF_INLINE V smaller(V a, V b) {
  return select(a > b, b, a);
}
template <class V>
static FASTRLHF_INLINE V absolute(V x) {
  return select(x < 0, -x, x);
}

// Reads and writes `size` elements, at most as many as there are lanes; the lanes past them are 0.
template <class V = Vec, class T>
static FASTRLHF_INLINE V load(const T* p, int size) {
  typename VectorOf<T, kLanesOf<V>>::Type v = {};
  memcpy(&v, p, size * sizeof(T));
  return __builtin_convertvector(v, V);
}
template <class V, class T>
static FASTRLHF_INLINE void store(T* p, V v, int size) {
  const auto narrow = __builtin_convertvector(v, typename VectorOf<T, kLanesOf<V>>::Type);
  memcpy(p, &narrow, size * sizeof(T));
}

// Which lanes count: those of `size` whose mask is set; without a mask all of them.
template <class V = Vec>
static FASTRLHF_INLINE BitsOf<V> load_mask(const bool* mask, int64_t i, int size) {
  typedef BitsOf<V> B;
  constexpr int n = kLanesOf<V>;
  B lane;
  for (int k = 0; k < n; k++) lane[k] = k;
  if (!mask) return lane < size;
  if constexpr (sizeof(lane[0]) ==
                8) {  // gcc widens bytes to 8 one by one: each lane picks its own
    uint64_t bytes = 0;
    memcpy(&bytes, mask + i, size);
    B place;
    for (int k = 0; k < n; k++) place[k] = static_cast<int64_t>(uint64_t(0xff) << 8 * k);
    return ((static_cast<int64_t>(bytes) - B{}) & place) != 0;
  } else {
    typename VectorOf<int8_t, n>::Type flags = {};
    memcpy(&flags, mask + i, size);
    const auto wider = __builtin_convertvector(flags, typename VectorOf<int16_t, n>::Type);
    return __builtin_convertvector(wider, B) != 0;
  }
}

// Lanes From to From + sizeof...(I). Not by memcpy: a vector whose address is taken, even here, is
// kept in memory all through the loop that adds to it.
template <int From, class V, int... I>
static FASTRLHF_INLINE auto part_of(V v, std::integer_sequence<int, I...>) {
  return typename VectorOf<ElementOf<V>, sizeof...(I)>::Type{v[From + I]...};
}

// In double, and in an order that depends on the number of lanes alone.
template <class V>
static FASTRLHF_INLINE double sum_lanes(V v) {
  constexpr int half = kLanesOf<V> / 2;
  if constexpr (half == 1) {
    return static_cast<double>(v[0]) + static_cast<double>(v[1]);
  } else {
    typedef typename VectorOf<double, half>::Type Wide;
    const auto lanes = std::make_integer_sequence<int, half>{};
    return sum_lanes(__builtin_convertvector(part_of<0>(v, lanes), Wide) +
                     __builtin_convertvector(part_of<half>(v, lanes), Wide));
  }
}

template <class V>
static FASTRLHF_INLINE double max_lanes(V v) {
  double top = v[0];
  for (int k = 1; k < kLanesOf<V>; k++) top = top < v[k] ? v[k] : top;
  return top;
}

// c[0] + c[1] x + ... + c[terms - 1] x^(terms - 1)
template <class V>
static FASTRLHF_INLINE V polynomial(const double* c, int terms, V x) {
  V sum = all<V>(c[terms - 1]);
#pragma GCC unroll 20
  for (int k = terms - 2; k >= 0; k--) sum = sum * x + static_cast<ElementOf<V>>(c[k]);
  return sum;
}

constexpr double kInverseFactorials[] = {1.0,
                                         1.0,
                                         1.0 / 2,
                                         1.0 / 6,
                                         1.0 / 24,
                                         1.0 / 120,
                                         1.0 / 720,
                                         1.0 / 5040,
                                         1.0 / 40320,
                                         1.0 / 362880,
                                         1.0 / 3628800,
                                         1.0 / 39916800,
                                         1.0 / 479001600,
                                         1.0 / 6227020800};

// e^x within 1.25 ulp; inf above, 0 below what the type holds (709.8 and -745.2; 88.7 and -104 in
// float), NaN for NaN.
template <class V>
static FASTRLHF_INLINE V exp_lanes(V x) {
  typedef ElementOf<V> E;
  constexpr bool wide = sizeof(E) == 8;
  constexpr E highest = wide ? 710 : 89, lowest = wide ? -746 : -104;
  constexpr int mantissa = wide ? 52 : 23, bias = wide ? 1024 : 128;
  // ln 2 in two parts, the first with so few bits that a product with k is exact
  constexpr E ln2 = wide ? 0x1.62e42fefa3800p-1 : 0x1.62e4p-1;
  constexpr E ln2_rest = wide ? 0x1.ef35793c76730p-45 : 0x1.7f7d1cf79abcap-20;
  x = select(x > highest, all<V>(highest), x);
  x = select(x < lowest, all<V>(lowest), x);
  const V magic = all<V>(wide ? 0x1.8p52 : 0x1.8p23);  // adding it rounds to an integer, found in
  const V shifted = x * static_cast<E>(1.4426950408889634) + magic;  // the low bits
  const V k = shifted - magic, r = (x - k * ln2) - k * ln2_rest;
  // Taylor: the first term left out is below 5e-18 for |r| <= ln(2) / 2; below 6e-9 in float
  const V p = polynomial(kInverseFactorials, wide ? 14 : 8, r);
  // 2^k in two factors, as k may exceed the exponents; biased to be positive under the shift
  typedef BitsOf<V> B;
  const B biased = (B)shifted - (B)magic + 2 * bias, half = biased >> 1;
  return p * (V)((half - 1) << mantissa) * (V)((biased - half - 1) << mantissa);
}

// e^r - 1 - r without cancellation; exp_r is e^r.
template <class V>
static FASTRLHF_INLINE V exp_minus_linear(V r, V exp_r) {
  constexpr bool wide = sizeof(r[0]) == 8;  // up to |r| = 1/4, 1 in float, the series is exact
  return select(r * r < (wide ? 0x1p-4f : 1.0f), r * r * polynomial(kInverseFactorials + 2, 11, r),
                exp_r - 1 - r);
}

// log((1 + s) / (1 - s)) = 2 artanh(s) for s in [0, 1/3], within 3 ulp, by its series.
template <class V>
static FASTRLHF_INLINE V twice_artanh(V s) {
  constexpr double c[] = {2.0,      2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11,
                          2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21, 2.0 / 23,
                          2.0 / 25, 2.0 / 27, 2.0 / 29, 2.0 / 31, 2.0 / 33};
  return s * polynomial(c, sizeof(ElementOf<V>) == 8 ? 17 : 8, s * s);
}

// log(1 + x) for x in [0, 1], within 3 ulp.
template <class V>
static FASTRLHF_INLINE V log1p_lanes(V x) {
  return twice_artanh(x / (x + 2));
}

constexpr int64_t kChunks = 64, kChunkSize = 2048;
constexpr int64_t kWorthThreads = 32768;  // below, waking threads costs more than it saves

// Calls body(i, size) for the elements i to i + size of [begin, end), as many as V has lanes.
template <class V = Vec, class Body>
static FASTRLHF_INLINE void for_lanes(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanesOf<V> <= end; i += kLanesOf<V>) body(i, kLanesOf<V>);
  if (i < end) body(i, static_cast<int>(end - i));
}

// Calls run, which shares a loop out by `omp for`, on all threads or, where that is not worth it, on
// this one. A parallel region of one thread would take as long as a small kernel.
template <class Run>
static FASTRLHF_INLINE void on_threads(bool worth, int64_t num_threads, const Run& run) {
  if (worth) {
#pragma omp parallel num_threads(num_threads)
    run();
  } else {
    run();
  }
}

// Calls body(begin, end, chunk) for pieces of [0, n) of at most kPiece elements, on all threads. A
// chunk is the pieces that one thread works through. The cut depends on n alone.
constexpr int64_t kPiece = 512;
template <class Body>
static FASTRLHF_INLINE void for_pieces(int64_t n, int64_t num_threads, const Body& shared) {
  const int64_t even = (n + kChunks - 1) / kChunks, size = even > kChunkSize ? even : kChunkSize;
  const int64_t num_chunks = (n + size - 1) / size;
  on_threads(n > kWorthThreads, num_threads, [=, &shared]() FASTRLHF_ONCE {
    const Body body = shared;  // in registers, where what it captured by value cannot be aliased
#pragma omp for
    for (int64_t c = 0; c < num_chunks; c++) {
      const int64_t end = (c + 1) * size < n ? (c + 1) * size : n;
      for (int64_t i = c * size; i < end; i += kPiece)
        body(i, i + kPiece < end ? i + kPiece : end, c);
    }
  });
}

// Calls body(i, size) for the elements i to i + size of [0, n), on all threads.
template <class V = Vec, class Body>
static FASTRLHF_INLINE void for_elements(int64_t n, int64_t num_threads, const Body& body) {
  for_pieces(n, num_threads, [=](int64_t begin, int64_t end, int64_t) FASTRLHF_LAMBDA {
    for_lanes<V>(begin, end, body);
  });
}

// A number for every chunk, merged in order.
struct Slots {
  double of[kChunks];
  explicit Slots(double start) {
    for (double& x : of) x = start;
  }
  double sum() const {
    double total = 0;
    for (const double x : of) total += x;
    return total;
  }
  double max() const {
    double top = of[0];
    for (const double x : of) top = top < x ? x : top;
    return top;
  }
};

// How many tokens count.
static inline int64_t count(const bool* mask, int64_t n) {
  if (!mask) return n;
  int64_t kept = 0, i = 0;
  while (i + 8 <= n) {  // by words, as compilers widen every byte to 8
    uint64_t sums = 0;  // one in each byte, of at most 255 words
    for (const int64_t last = n - 8 < i + 254 * 8 ? n - 8 : i + 254 * 8; i <= last; i += 8) {
      uint64_t word;
      memcpy(&word, mask + i, 8);
      sums += word;
    }
    sums = (sums & 0x00ff00ff00ff00ff) + (sums >> 8 & 0x00ff00ff00ff00ff);
    kept += static_cast<int64_t>(sums * 0x0001000100010001 >> 48);
  }
  for (; i < n; i++) kept += mask[i];
  return kept;
}

// What turns a sum into a mean: over the denominator of the caller, or without one over what
// counts.
static inline double mean_scale(double denominator, int64_t kept) {
  if (denominator > 0) return 1 / denominator;
  return kept > 0 ? 1 / static_cast<double>(kept) : 1.0;
}

}  // namespace
}  // namespace FASTRLHF_ISA
