// What the element-wise kernels share: a vector of doubles as wide as the instruction set has, an
// exponential, and sums that do not depend on the number of threads. All arithmetic is double
// whatever the tensors hold: these kernels wait for memory. The vectors are GCC's and clang's, so
// one source serves every instruction set.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define FASTRLHF_INLINE inline __attribute__((always_inline))
#define FASTRLHF_LAMBDA __attribute__((always_inline))

namespace FASTRLHF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef double Vec __attribute__((vector_size(kLanes * 8)));
// an integer a lane, or a truth value: 0 or -1
typedef int64_t Bits __attribute__((vector_size(kLanes * 8)));
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int8_t Flags __attribute__((vector_size(kLanes)));

static FASTRLHF_INLINE Vec all(double x) { return x - Vec{}; }
static FASTRLHF_INLINE Vec select(Bits which, Vec yes, Vec no) { return which ? yes : no; }
static FASTRLHF_INLINE Vec larger(Vec a, Vec b) { return select(a < b, b, a); }

// Reads and writes `size` <= kLanes elements; the lanes past them are 0.
static FASTRLHF_INLINE Vec load(const double* p, int size) {
  Vec v = {};
  memcpy(&v, p, size * sizeof(double));
  return v;
}
static FASTRLHF_INLINE Vec load(const float* p, int size) {
  Floats v = {};
  memcpy(&v, p, size * sizeof(float));
  return __builtin_convertvector(v, Vec);
}
static FASTRLHF_INLINE void store(double* p, Vec v, int size) {
  memcpy(p, &v, size * sizeof(double));
}
static FASTRLHF_INLINE void store(float* p, Vec v, int size) {
  const Floats f = __builtin_convertvector(v, Floats);
  memcpy(p, &f, size * sizeof(float));
}

// Which lanes count: those of `size` whose mask is set; without a mask all of them.
static FASTRLHF_INLINE Bits load_mask(const bool* mask, int64_t i, int size) {
  Bits lane;
  for (int k = 0; k < kLanes; k++) lane[k] = k;
  if (!mask) return lane < size;
  Flags flags = {};
  memcpy(&flags, mask + i, size);
  return __builtin_convertvector(flags, Bits) != 0;
}

// e^x within an ulp; inf above 709.8, 0 below -745.2, NaN for NaN.
static FASTRLHF_INLINE Vec exp_lanes(Vec x) {
  x = select(x > 710.0, all(710.0), x);
  x = select(x < -746.0, all(-746.0), x);
  const Vec magic = all(0x1.8p52);  // adding it rounds to an integer, found in the low bits
  const Vec shifted = x * 1.4426950408889634 + magic, k = shifted - magic;
  // x - k ln 2, so |r| <= ln(2) / 2
  const Vec r = (x - k * 0x1.62e42fefa3800p-1) - k * 0x1.ef35793c76730p-45;
  Vec p = all(1.0 / 6227020800);  // Taylor: the first term left out is r^14 / 14! < 5e-18
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // 2^k in two factors, as k may exceed the exponents; biased to be positive under the shift
  const Bits biased = (Bits)shifted - (Bits)magic + 2048, half = biased >> 1;
  return p * (Vec)((half - 1) << 52) * (Vec)((biased - half - 1) << 52);
}

// e^r - 1 - r without cancellation; exp_r is e^r.
static FASTRLHF_INLINE Vec exp_minus_linear(Vec r, Vec exp_r) {
  Vec p = r * (1.0 / 10) + 1.0;
  p = p * r * (1.0 / 9) + 1.0;
  p = p * r * (1.0 / 8) + 1.0;
  p = p * r * (1.0 / 7) + 1.0;
  p = p * r * (1.0 / 6) + 1.0;
  p = p * r * (1.0 / 5) + 1.0;
  p = p * r * (1.0 / 4) + 1.0;
  p = p * r * (1.0 / 3) + 1.0;
  return select(r * r < 0x1p-8, 0.5 * r * r * p, exp_r - 1.0 - r);
}

constexpr int64_t kChunks = 64, kChunkSize = 2048;
constexpr int64_t kWorthThreads = 32768;  // below, waking threads costs more than it saves

// Calls body(i, size, chunk) for elements i to i + size of [0, n), on all threads. The cut depends
// on n alone.
template <class Body>
static FASTRLHF_INLINE void for_elements(int64_t n, int64_t num_threads, const Body& body) {
  const int64_t even = (n + kChunks - 1) / kChunks, size = even > kChunkSize ? even : kChunkSize;
  const int64_t num_chunks = (n + size - 1) / size;
#pragma omp parallel for num_threads(num_threads) if (n > kWorthThreads)
  for (int64_t c = 0; c < num_chunks; c++) {
    const int64_t end = (c + 1) * size < n ? (c + 1) * size : n;
    int64_t i = c * size;
    for (; i + kLanes <= end; i += kLanes) body(i, kLanes, c);
    if (i < end) body(i, static_cast<int>(end - i), c);
  }
}

// A number for every lane of every chunk, merged in order.
struct Slots {
  Vec of[kChunks];
  explicit Slots(double start) {
    for (Vec& v : of) v = all(start);
  }
  double sum() const {
    Vec lanes = {};
    for (const Vec& v : of) lanes += v;
    double total = 0;
    for (int i = 0; i < kLanes; i++) total += lanes[i];
    return total;
  }
  double max() const {
    Vec lanes = of[0];
    for (const Vec& v : of) lanes = larger(lanes, v);
    double top = lanes[0];
    for (int i = 1; i < kLanes; i++) top = top < lanes[i] ? lanes[i] : top;
    return top;
  }
};

// How many tokens count.
static inline int64_t count(const bool* mask, int64_t n) {
  if (!mask) return n;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) kept += mask[i];
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
