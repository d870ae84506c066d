// The extension module fastrlhf._cuda. Imports on a machine without GPU or driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

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
}
