// The extension module fastrlhf._cuda: one function for every kernel. Imports on a machine without
// GPU or driver.
#include <cuda_runtime.h>

#include <string>

#include "module.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.attr("compiled_with") = CUDART_VERSION;
  m.def(
      "num_devices",
      [] {
        int count = 0;
        const cudaError_t status = cudaGetDeviceCount(&count);
        return py::make_tuple(status == cudaSuccess ? count : 0,
                              status == cudaSuccess ? "" : std::string(cudaGetErrorString(status)));
      },
      "(number of GPUs, why there is none or an empty text)");
  for (const auto* k = fastrlhf::first; k; k = k->next)
    m.attr(k->name) = fastrlhf::function_of(k);
  fastrlhf::failure = [] {
    const cudaError_t status = cudaGetLastError();  // of the launch: nothing waits for the kernel
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  };
}
