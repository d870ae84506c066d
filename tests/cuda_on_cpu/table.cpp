// The kernels of one .cu file, for ctypes to walk.
#include "kernel.h"

extern "C" {
fastrlhf::Kernel* cuda_on_cpu_kernels = nullptr;
int cuda_on_cpu_descending = 0;
}

void fastrlhf::add_kernel(Kernel* kernel) {
  kernel->next = cuda_on_cpu_kernels;
  cuda_on_cpu_kernels = kernel;
}
