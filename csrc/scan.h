// The recurrence x_t + decay x_{t+1} in a segment of a packed batch, a vector of tokens at a time.
#pragma once
#include <stdint.h>
#include <string.h>

#include "numeric.h"

namespace FASTRLHF_ISA {
namespace {

// Lane i gets lane i + By, and 0 where there is none.
template <int By, class V, int... I>
static FASTRLHF_INLINE V moved(V v, std::integer_sequence<int, I...>) {
  constexpr int n = kLanesOf<V>;
#ifdef __clang__
  return __builtin_shufflevector(v, V{}, (I + By < n ? I + By : n)...);
#else
  return __builtin_shuffle(v, V{}, BitsOf<V>{(I + By < n ? I + By : n)...});
#endif
}
template <int By, class V>
static FASTRLHF_INLINE V moved(V v) {
  return moved<By>(v, std::make_integer_sequence<int, kLanesOf<V>>{});
}

// Powers of the decay of a recurrence.
template <class T>
struct Decay {
  static constexpr int kSize = kLanesOf<Lanes<T>>;
  T one, two, four, eight;
  Lanes<T> to_next;  // of each lane, from the token after the vector

  explicit Decay(double decay) {
    one = static_cast<T>(decay);
    two = static_cast<T>(decay * decay);
    four = static_cast<T>(decay * decay * decay * decay);
    eight = static_cast<T>(decay * decay * decay * decay * decay * decay * decay * decay);
    double power = 1;
    for (int i = kSize - 1; i >= 0; i--) {
      power *= decay;
      to_next[i] = static_cast<T>(power);
    }
  }

  // The recurrence within a vector, in log2(kSize) steps: after each, a lane holds the sum of twice
  // as many.
  FASTRLHF_INLINE Lanes<T> within(Lanes<T> x) const {
    x += one * moved<1>(x);
    if constexpr (kSize > 2) x += two * moved<2>(x);
    if constexpr (kSize > 4) x += four * moved<4>(x);
    if constexpr (kSize > 8) x += eight * moved<8>(x);
    return x;
  }
};

// Calls take(t, sums, size) for tokens t to t + size of [begin, end), from the last to the first,
// where give(t, size) gives their x. The result depends on the segment alone.
template <class T, class Give, class Take>
static FASTRLHF_INLINE void scan_segment(int64_t begin, int64_t end, const Decay<T>& decay,
                                         const Give& give, const Take& take) {
  constexpr int kSize = Decay<T>::kSize;
  T next = 0;  // the sum at the token after those at hand
  const int rest = static_cast<int>((end - begin) % kSize);
  int64_t t = end - rest;
  if (rest > 0) {
    const auto sums = decay.within(give(t, rest));
    take(t, sums, rest);
    next = sums[0];
  }
  while (t > begin) {
    t -= kSize;
    const auto sums = decay.within(give(t, kSize)) + decay.to_next * next;
    take(t, sums, kSize);
    next = sums[0];
  }
}

// Values one token later: of tokens t + 1 to t + 1 + size, `last` standing for the one at `end`.
template <class T>
static FASTRLHF_INLINE Lanes<T> load_next(const T* values, int64_t t, int size, int64_t end,
                                          T last) {
  if (t + size < end) return load<Lanes<T>>(values + t + 1, size);
  T next[kLanesOf<Lanes<T>>] = {};
  memcpy(next, values + t + 1, (size - 1) * sizeof(T));
  next[size - 1] = last;
  return load<Lanes<T>>(next, kLanesOf<Lanes<T>>);
}

// The same with x_t = reward_t + gamma value_{t+1} - value_t, last_value standing for the value at
// `end`.
template <class T, class Take>
static FASTRLHF_INLINE void scan_deltas(const T* rewards, const T* values, T last_value,
                                        int64_t begin, int64_t end, T gamma, const Decay<T>& decay,
                                        const Take& take) {
  const auto delta = [&](int64_t t, int size) FASTRLHF_LAMBDA {
    const auto next_values = load_next(values, t, size, end, last_value);
    return load<Lanes<T>>(rewards + t, size) + gamma * next_values -
           load<Lanes<T>>(values + t, size);
  };
  scan_segment(begin, end, decay, delta, take);
}

}  // namespace
}  // namespace FASTRLHF_ISA
