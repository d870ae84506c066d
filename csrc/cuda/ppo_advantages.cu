// From scores and log-probabilities to whitened advantages in two launches: rewards, advantages,
// returns and a row of sums from each block; then the whitening, whose blocks each merge the rows.
#include "kernel.h"
#include "launch.h"
#include "moments.cuh"
#include "scan.cuh"

namespace FASTRLHF_ISA {
namespace {

constexpr int64_t kMostRows = 512;    // rows of the workspace: blocks of the first launch
constexpr int64_t kMostBlocks = 264;  // of the second, each of which reads all rows

struct Row {
  Moments advantage, target;
  double kl, reward, value;
};

__device__ inline Row merged(const Row& a, const Row& b) {
  return {merged(a.advantage, b.advantage), merged(a.target, b.target), a.kl + b.kl,
          a.reward + b.reward, a.value + b.value};
}

template <class T>
struct Inputs {
  const T *scores, *logprobs, *ref_logprobs, *values;
  const int32_t* cu_seqlens;
  int64_t num_tokens, num_sequences;
};

template <class T>
struct Outputs {
  T *rewards, *advantages, *returns;
};

// r_t = -kl_coef (logprob - ref_logprob), plus the score at the last token of a sequence; from
// these advantages and returns. A block takes every gridDim.x-th sequence.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    shape(Inputs<T> in, Outputs<T> out, Row* rows, T kl_coef, T gamma, T decay) {
  Gatherer advantages, returns;
  double kl = 0, rewards = 0, values = 0;
  for (int64_t n = blockIdx.x; n < in.num_sequences; n += gridDim.x) {
    const Range range = segment_of(in.cu_seqlens, n, in.num_tokens);
    const auto load = [&](int64_t t) -> Token<T> {
      const T difference = in.logprobs[t] - in.ref_logprobs[t], value = in.values[t];
      T reward = -kl_coef * difference;
      if (t == range.end - 1) reward += in.scores[n];
      out.rewards[t] = reward;
      kl += difference;
      rewards += reward;
      values += value;
      return {reward, value, true};
    };
    const auto store = [&](int64_t t, T advantage, T value) {
      const T target = advantage + value;
      out.advantages[t] = advantage;
      out.returns[t] = target;
      advantages.add(advantage);
      returns.add(target);
    };
    scan_segment<T>(range.begin, range.end, 0, gamma, decay, load, store);
  }
  const Row row =
      merged_over_block<Row>({advantages.moments(), returns.moments(), kl, rewards, values});
  if (threadIdx.x == 0) rows[blockIdx.x] = row;
}

// stats: means a sequence of KL and reward; means a token of value, return and advantage; the
// deviation of the advantage; the explained variance.
template <class T>
__global__ void __launch_bounds__(kThreads)
    whiten_and_report(T* advantages, const Row* rows, int num_rows, T* stats, int64_t num_tokens,
                      int64_t num_sequences, bool whitens, double eps) {
  const Row all = merged_rows(rows, num_rows);
  const double n = num_tokens > 0 ? num_tokens : 1,
               sequences = num_sequences > 0 ? num_sequences : 1;
  const double variance = all.advantage.squares / n;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    stats[0] = static_cast<T>(all.kl / sequences);
    stats[1] = static_cast<T>(all.reward / sequences);
    stats[2] = static_cast<T>(all.value / n);
    stats[3] = static_cast<T>(all.target.mean);
    stats[4] = static_cast<T>(all.advantage.mean);
    stats[5] = static_cast<T>(sqrt(variance));
    const double squares = all.target.squares;
    stats[6] = squares == 0 ? 0 : static_cast<T>(1 - all.advantage.squares / squares);
  }
  if (!whitens) return;
  const double scale = 1 / sqrt(variance + eps);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < num_tokens;
       t += step)
    advantages[t] = static_cast<T>((advantages[t] - all.advantage.mean) * scale);
}

// rows: a workspace of kMostRows rows of 9
template <class T>
void ppo_advantages(const T* scores, const T* logprobs, const T* ref_logprobs, const T* values,
                    const int32_t* cu_seqlens, T* rewards, T* advantages, T* returns, T* stats,
                    double* rows, int64_t num_tokens, int64_t num_sequences, double kl_coef,
                    double gamma, double lam, bool whitens, double eps, cudaStream_t stream) {
  const Inputs<T> in = {scores,     logprobs,   ref_logprobs, values,
                        cu_seqlens, num_tokens, num_sequences};
  const Outputs<T> out = {rewards, advantages, returns};
  const int64_t num_rows = num_sequences < kMostRows ? num_sequences : kMostRows;
  Row* typed_rows = reinterpret_cast<Row*>(rows);
  FASTRLHF_LAUNCH(shape<T>, num_rows, kThreads, stream, in, out, typed_rows,
                  static_cast<T>(kl_coef), static_cast<T>(gamma), static_cast<T>(gamma * lam));
  const int64_t wanted = whitens ? (num_tokens + 4 * kThreads - 1) / (4 * kThreads) : 1;
  const int64_t blocks = wanted < 1 ? 1 : wanted < kMostBlocks ? wanted : kMostBlocks;
  FASTRLHF_LAUNCH(whiten_and_report<T>, blocks, kThreads, stream, advantages, typed_rows,
                  static_cast<int>(num_rows), stats, num_tokens, num_sequences, whitens, eps);
}

FASTRLHF_KERNEL(ppo_advantages_float32, ppo_advantages<float>)
FASTRLHF_KERNEL(ppo_advantages_float64, ppo_advantages<double>)

}  // namespace
}  // namespace FASTRLHF_ISA
