// A linear layer on few rows: the weight is read once, as it lies, for all of them.
#include "kernel.h"
#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// A vector anywhere in memory. Reading it by memcpy would keep the sums in memory, too.
template <class V>
struct InMemory {
  typedef ElementOf<V> Type
      __attribute__((vector_size(sizeof(V)), aligned(sizeof(ElementOf<V>)), may_alias));
};
template <class V>
FASTRLHF_INLINE V read_vector(const ElementOf<V>* p) {
  return *reinterpret_cast<const typename InMemory<V>::Type*>(p);
}
template <class V>
FASTRLHF_INLINE void write_vector(ElementOf<V>* p, V v) {
  *reinterpret_cast<typename InMemory<V>::Type*>(p) = v;
}

constexpr int kMostVectors = kBytes == 64 ? 4 : 2;  // of rows at once

// How many outputs are summed at once beside that many vectors of rows: all sums stay in registers,
// of which AVX-512 has 32.
constexpr int outputs_beside(int vectors) {
  return kBytes == 64 ? (vectors == 1 ? 16 : 24 / vectors) : 12 / vectors;
}

// sums (kOutputs, kVectors lanes) of columns (width, kVectors lanes) times rows of weight
template <class V, int kOutputs, int kVectors>
FASTRLHF_INLINE void sum_tile(const ElementOf<V>* columns, const ElementOf<V>* weight,
                              int64_t width, ElementOf<V>* sums) {
  constexpr int lanes = kLanesOf<V>;
  V of[kOutputs][kVectors];
  for (int n = 0; n < kOutputs; n++)
    for (int v = 0; v < kVectors; v++) of[n][v] = V{};
  for (int64_t k = 0; k < width; k++) {
    V x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) x[v] = read_vector<V>(columns + (k * kVectors + v) * lanes);
#pragma GCC unroll 16
    for (int n = 0; n < kOutputs; n++) {
      const ElementOf<V> w = weight[n * width + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) of[n][v] += x[v] * w;
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < kOutputs; n++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++)
      write_vector<V>(sums + (n * kVectors + v) * lanes, of[n][v]);
  }
}

template <class V, int kOutputs, int kVectors>
FASTRLHF_INLINE void some_outputs(const ElementOf<V>* columns, const ElementOf<V>* weight,
                                  ElementOf<V>* out, int64_t num_rows, int64_t num_outputs,
                                  int64_t width) {
  constexpr int size = kVectors * kLanesOf<V>;
  ElementOf<V> sums[kOutputs * size];
  sum_tile<V, kOutputs, kVectors>(columns, weight, width, sums);
  for (int64_t m = 0; m < num_rows; m++)
    for (int n = 0; n < kOutputs; n++) out[m * num_outputs + n] = sums[n * size + m];
}

template <class V, int kVectors>
void all_outputs(const ElementOf<V>* columns, const ElementOf<V>* weight, ElementOf<V>* out,
                 int64_t num_rows, int64_t num_outputs, int64_t width, int64_t num_threads) {
  constexpr int tile = outputs_beside(kVectors);
  const int64_t num_tiles = num_outputs / tile;
  on_threads(num_outputs * width > kWorthThreads, num_threads, [=]() FASTRLHF_ONCE {
#pragma omp for
    for (int64_t t = 0; t < num_tiles; t++)
      some_outputs<V, tile, kVectors>(columns, weight + t * tile * width, out + t * tile, num_rows,
                                      num_outputs, width);
  });
  for (int64_t n = num_tiles * tile; n < num_outputs; n++)
    some_outputs<V, 1, kVectors>(columns, weight + n * width, out + n, num_rows, num_outputs,
                                 width);
}

// rows (N, D), weight (V, D), out (N, V); columns: room for D vectors of rows, as many as are taken
// at once
template <class T>
void thin_linear(const T* rows, const T* weight, T* columns, T* out, int64_t num_rows,
                 int64_t num_outputs, int64_t width, int64_t num_threads) {
  typedef Lanes<T> V;
  constexpr int lanes = kLanesOf<V>;
  for (int64_t first = 0; first < num_rows; first += kMostVectors * lanes) {
    const int64_t left = num_rows - first,
                  taken = left < kMostVectors * lanes ? left : kMostVectors * lanes;
    const int64_t vectors = (taken + lanes - 1) / lanes, stride = vectors * lanes;
    for (int64_t k = 0; k < width; k++)
      for (int64_t m = 0; m < stride; m++)
        columns[k * stride + m] = m < taken ? rows[(first + m) * width + k] : T(0);
    T* const part = out + first * num_outputs;
    if (vectors == 1)
      all_outputs<V, 1>(columns, weight, part, taken, num_outputs, width, num_threads);
    else if (vectors == 2)
      all_outputs<V, 2>(columns, weight, part, taken, num_outputs, width, num_threads);
    else if (vectors == 3)
      all_outputs<V, 3>(columns, weight, part, taken, num_outputs, width, num_threads);
    else
      all_outputs<V, 4>(columns, weight, part, taken, num_outputs, width, num_threads);
  }
}

FASTRLHF_KERNEL(thin_linear_float32, thin_linear<float>)
FASTRLHF_KERNEL(thin_linear_float64, thin_linear<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
