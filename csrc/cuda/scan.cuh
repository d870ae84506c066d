// The recurrence of advantages from the end of a segment to its start, by one block.
//
// A token that counts turns what follows it, (A, V), into (r - v + gamma V + decay A, v). A run of
// tokens turns it into (b + a A + c V, v) with numbers of its own, and two such maps after each
// other are one more. So each thread composes the maps of its tokens, the block scans those, and
// each thread then runs over its tokens with what follows them known. The result depends on the
// segment alone: neither on its neighbours nor on the order of threads.
#pragma once
#include <stdint.h>

namespace FASTRLHF_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// on a multiprocessor; left to itself the compiler wants more and spills
constexpr int kBlocks = 4;
// tokens of a thread, and of a block, at a time
constexpr int kItems = 8, kTile = kThreads * kItems;

// the place of token i in shared memory: the gaps keep the threads, kItems apart, on different
// banks
__device__ inline int slot(int i) { return i + i / kItems; }

template <class T>
struct Token {
  T reward, value;
  bool counts;  // false: what follows the token is carried through it
};

template <class T>
struct Map {
  T a, b, c, v;
  int any;  // 0 for the identity, whose numbers mean nothing
};

template <class T>
__device__ Map<T> compose(const Map<T>& earlier, const Map<T>& later) {
  if (!later.any) return earlier;
  if (!earlier.any) return later;
  const T b = earlier.b + earlier.a * later.b + earlier.c * later.v;
  return {earlier.a * later.a, b, earlier.a * later.c, earlier.v, 1};
}

template <class T>
__device__ Map<T> from_lane_above(const Map<T>& map, int by) {
  constexpr unsigned all = 0xffffffffu;
  return {__shfl_down_sync(all, map.a, by), __shfl_down_sync(all, map.b, by),
          __shfl_down_sync(all, map.c, by), __shfl_down_sync(all, map.v, by),
          __shfl_down_sync(all, map.any, by)};
}

// The map of all tokens of the tile that come after those of this thread, whose own map is `map`.
template <class T>
__device__ Map<T> map_of_later(Map<T> map, Map<T>* of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const Map<T> other = from_lane_above(map, by);
    if (lane + by < 32) map = compose(map, other);
  }
  if (lane == 0) of_warps[warp] = map;
  Map<T> later = {};
  const Map<T> above = from_lane_above(map, 1);
  __syncthreads();
  for (int w = kWarps - 1; w > warp; w--) later = compose(of_warps[w], later);
  return lane < 31 ? compose(above, later) : later;
}

// Calls store(t, A, v) for each token t in [begin, end), where load(t) gives its Token and A_t = r
// - v + gamma V + decay A_next; after the last token V is last_value. All threads of a block of
// kThreads call this together.
template <class T, class Load, class Store>
__device__ void scan_segment(int64_t begin, int64_t end, T last_value, T gamma, T decay,
                             const Load& load, const Store& store) {
  __shared__ T advantages[kTile + kThreads], values[kTile + kThreads];
  __shared__ bool counts[kTile];
  __shared__ Map<T> of_warps[kWarps];
  __shared__ T first_advantage, first_value;
  const int thread = threadIdx.x;
  T next_advantage = 0, next_value = last_value;  // of what follows the tile
  for (int64_t start = end - kTile; start > begin - kTile; start -= kTile) {
#pragma unroll
    for (int i = thread; i < kTile; i += kThreads) {
      const Token<T> token = start + i >= begin ? load(start + i) : Token<T>{};
      advantages[slot(i)] = token.reward - token.value;
      values[slot(i)] = token.value;
      counts[i] = token.counts;
    }
    __syncthreads();
    const int own = thread * kItems;
    Map<T> map = {};
#pragma unroll
    for (int i = own + kItems - 1; i >= own; i--)
      if (counts[i]) map = compose({decay, advantages[slot(i)], gamma, values[slot(i)], 1}, map);
    const Map<T> later = map_of_later(map, of_warps);
    T advantage =
        later.any ? later.b + later.a * next_advantage + later.c * next_value : next_advantage;
    T value = later.any ? later.v : next_value;
#pragma unroll
    for (int i = own + kItems - 1; i >= own; i--)
      if (counts[i]) {
        advantage = advantages[slot(i)] + gamma * value + decay * advantage;
        advantages[slot(i)] = advantage;
        value = values[slot(i)];
      }
    if (thread == 0) {
      first_advantage = advantage;
      first_value = value;
    }
    __syncthreads();
#pragma unroll
    for (int i = thread; i < kTile; i += kThreads)
      if (start + i >= begin) store(start + i, advantages[slot(i)], values[slot(i)]);
    next_advantage = first_advantage;
    next_value = first_value;
    __syncthreads();
  }
}

struct Range {
  int64_t begin, end;
};

// Segment n, cut to the tokens that there are, as nobody has looked at cu_seqlens before.
__device__ inline Range segment_of(const int32_t* cu_seqlens, int64_t n, int64_t num_tokens) {
  const int64_t from = cu_seqlens[n], to = cu_seqlens[n + 1];
  const int64_t begin = from < 0 ? 0 : from < num_tokens ? from : num_tokens;
  return {begin, to < begin ? begin : to < num_tokens ? to : num_tokens};
}

}  // namespace
}  // namespace FASTRLHF_ISA
