// Attention of one query a row over its slot of a cache, with grouped queries, ragged lengths and a
// window.
#include "exp.h"
#include "half.h"
#include "kernel.h"

namespace FASTRLHF_ISA {
namespace {

constexpr int64_t BLOCK = 64;  // keys scored at once; their values are added before the next block

// out (K,) = softmax(scale query . keys) values over num_keys keys, by the online softmax: running
// maximum and sum.
template <class T, class Cache>
void attend(const T* query, const Cache* keys, const Cache* values, T* out, int64_t num_keys,
            int64_t width, T scale) {
  T highest = -INFINITY, total = 0, scores[BLOCK];
  for (int64_t k = 0; k < width; k++) out[k] = 0;
  for (int64_t start = 0; start < num_keys; start += BLOCK) {
    const int64_t count = num_keys - start < BLOCK ? num_keys - start : BLOCK;
    T block_highest = highest;
    for (int64_t t = 0; t < count; t++) {
      const Cache* key = keys + (start + t) * width;
      T dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t k = 0; k < width; k++) dot += query[k] * load(key[k]);
      scores[t] = dot * scale;
      block_highest = scores[t] > block_highest ? scores[t] : block_highest;
    }
    const T shrink = start ? exp_nonpositive(highest - block_highest) : T(0);
    highest = block_highest;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < count; t++) {
      scores[t] = exp_nonpositive(scores[t] - highest);
      sum += scores[t];
    }
    total = total * shrink + sum;
#pragma omp simd
    for (int64_t k = 0; k < width; k++) out[k] *= shrink;
    for (int64_t t = 0; t < count; t++) {
      const Cache* value = values + (start + t) * width;
#pragma omp simd
      for (int64_t k = 0; k < width; k++) out[k] += scores[t] * load(value[k]);
    }
  }
  const T share = num_keys > 0 ? 1 / total : T(0);
  for (int64_t k = 0; k < width; k++) out[k] *= share;
}

// query, out (N, H, K) contiguous; caches (N, kv_heads, Tmax, K), contiguous in their last two
// dimensions
template <class T, class Cache>
void decode_attention(const T* query, const Cache* key_cache, const Cache* value_cache,
                      const int32_t* lengths, T* out, int64_t num_rows, int64_t num_heads,
                      int64_t num_kv_heads, int64_t width, int64_t key_row_stride,
                      int64_t key_head_stride, int64_t value_row_stride, int64_t value_head_stride,
                      double scale, int64_t window, int64_t num_threads) {
  const int64_t group = num_heads / num_kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic, 4) num_threads(num_threads)
  for (int64_t n = 0; n < num_rows; n++) {
    for (int64_t h = 0; h < num_kv_heads; h++) {
      const int64_t length = lengths[n],
                    start = window > 0 && length > window ? length - window : 0;
      const Cache* keys = key_cache + n * key_row_stride + h * key_head_stride + start * width;
      const Cache* values =
          value_cache + n * value_row_stride + h * value_head_stride + start * width;
      for (int64_t g = 0; g < group; g++) {
        const int64_t at = (n * num_heads + h * group + g) * width;
        attend(query + at, keys, values, out + at, length - start, width, static_cast<T>(scale));
      }
    }
  }
}

FASTRLHF_KERNEL(decode_attention_float32, decode_attention<float, float>)
FASTRLHF_KERNEL(decode_attention_float64, decode_attention<double, double>)
FASTRLHF_KERNEL(decode_attention_bfloat16, decode_attention<float, bfloat16>)
FASTRLHF_KERNEL(decode_attention_float16, decode_attention<float, float16>)

}  // namespace
}  // namespace FASTRLHF_ISA
