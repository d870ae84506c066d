// Stands in for CUDA's cuda_runtime.h so that a .cu file compiles with a C++ compiler and runs on
// the CPU.
//
// Blocks run one after another; the threads of a block are fibres on one thread of the system,
// which take turns at barriers and shuffles. So __shared__ is a plain static, and a run with the
// fibres and blocks in descending order (cuda_on_cpu_descending) gives another result where a
// barrier is missing. What is caught: wrong indices, reductions, masks and tails, missing or
// divergent barriers. What is not: the memory model, occupancy, speed.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define FASTRLHF_LAUNCH(KERNEL, BLOCKS, THREADS, STREAM, ...) \
  cuda_on_cpu::launch(BLOCKS, THREADS, [=] { KERNEL(__VA_ARGS__); })

typedef struct CUstream_st* cudaStream_t;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

extern "C" int cuda_on_cpu_descending;

namespace cuda_on_cpu {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackSize = 128 << 10;

struct Barrier {
  int alive = 0, arrived = 0;
  unsigned generation = 0;
};

struct Fibre {
  jmp_buf at;
  ucontext_t start;
  std::vector<char> stack;
  dim3 index;
  bool started = false, done = true;
  unsigned num_shuffles = 0;
};

inline Fibre fibres[kMaxThreads];
inline Barrier of_block, of_warp[kMaxThreads / kWarp];
inline uint64_t shuffled[kMaxThreads / kWarp][2][kWarp];
inline dim3 block_index, block_size, grid_size;
inline std::function<void()> body;
inline ucontext_t outside;
inline int current, num_fibres, num_idle;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_on_cpu: %s\n", what);
  abort();
}

// jumps, as swapcontext makes a system call
inline void switch_to(int next) {
  if (next == current) return;
  Fibre& from = fibres[current];
  current = next;
  if (_setjmp(from.at)) return;
  Fibre& to = fibres[next];
  if (to.started) _longjmp(to.at, 1);
  to.started = true;
  setcontext(&to.start);
}

inline int following() {
  const int step = cuda_on_cpu_descending ? num_fibres - 1 : 1;
  int next = current;
  do next = (next + step) % num_fibres;
  while (fibres[next].done);
  return next;
}

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.generation++;
  num_idle = 0;
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.alive) return release(barrier);
  while (barrier.generation == generation) {
    if (++num_idle > 2 * num_fibres) fail("the threads of a block wait at different barriers");
    switch_to(following());
  }
}

inline void leave(Barrier& barrier) {
  barrier.alive--;
  if (barrier.arrived && barrier.arrived == barrier.alive) release(barrier);
}

// What a fibre does: the kernel's body for its thread, once for every block.
inline void run() {
  for (;;) {
    body();
    fibres[current].done = true;
    num_idle = 0;
    leave(of_warp[current / kWarp]);
    leave(of_block);
    if (of_block.alive) {
      switch_to(following());
    } else if (!_setjmp(fibres[current].at)) {
      setcontext(&outside);
    }
  }
}

inline void prepare(int i) {
  Fibre& fibre = fibres[i];
  fibre.stack.resize(kStackSize);
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack.data();
  fibre.start.uc_stack.ss_size = kStackSize;
  makecontext(&fibre.start, run, 0);
}

inline void run_block() {
  of_block = Barrier{num_fibres};
  for (int i = 0; i < num_fibres; i++) {
    Fibre& fibre = fibres[i];
    if (i % kWarp == 0) of_warp[i / kWarp] = Barrier{};
    of_warp[i / kWarp].alive++;
    if (fibre.stack.empty()) prepare(i);
    fibre.index = dim3{static_cast<unsigned>(i)};
    fibre.done = false;
    fibre.num_shuffles = 0;
  }
  num_idle = 0;
  volatile bool returned = false;
  getcontext(&outside);
  if (returned) return;
  returned = true;
  current = cuda_on_cpu_descending ? num_fibres - 1 : 0;
  Fibre& first = fibres[current];
  if (first.started) _longjmp(first.at, 1);
  first.started = true;
  setcontext(&first.start);
}

inline void launch(int64_t num_blocks, int num_threads, std::function<void()> kernel) {
  if (num_threads < 1 || num_threads > kMaxThreads) fail("a block has 1 to 1024 threads");
  body = std::move(kernel);
  num_fibres = num_threads;
  block_size = dim3{static_cast<unsigned>(num_threads)};
  grid_size = dim3{static_cast<unsigned>(num_blocks)};
  for (int64_t i = 0; i < num_blocks; i++) {
    block_index = dim3{static_cast<unsigned>(cuda_on_cpu_descending ? num_blocks - 1 - i : i)};
    run_block();
  }
}

// Two buffers a warp: who writes one for the next but one shuffle has passed the barrier at which
// all had read it.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int warp = current / kWarp, lane = current % kWarp;
  if (mask != 0xffffffffu) fail("shuffles are modelled for whole warps");
  uint64_t* buffer = shuffled[warp][fibres[current].num_shuffles++ % 2];
  memcpy(&buffer[lane], &value, sizeof value);
  wait(of_warp[warp]);
  memcpy(&value, &buffer[source < kWarp ? source : lane], sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::fibres[cuda_on_cpu::current].index)
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::of_block); }
inline void __syncwarp() {
  cuda_on_cpu::wait(cuda_on_cpu::of_warp[cuda_on_cpu::current / cuda_on_cpu::kWarp]);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::shuffle(mask, value, lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::current % 32 + by);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::current % 32 ^ bits);
}
