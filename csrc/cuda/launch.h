// FASTRLHF_LAUNCH(kernel, blocks, threads, stream, arguments...) starts a kernel, or does nothing
// where there are no blocks; a template with a comma stands in parentheses. A stand-in for
// cuda_runtime.h that defines it differently runs the same source on a CPU (tests/cuda_on_cpu).
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#ifndef FASTRLHF_LAUNCH
#define FASTRLHF_LAUNCH(KERNEL, BLOCKS, THREADS, STREAM, ...)                          \
  do {                                                                                 \
    const auto num_blocks_ = (BLOCKS);                                                 \
    if (num_blocks_ > 0)                                                               \
      KERNEL<<<static_cast<unsigned>(num_blocks_), THREADS, 0, STREAM>>>(__VA_ARGS__); \
  } while (0)
#endif
