// What the two extension modules share: the kernels that have added themselves, and the call of one
// from Python.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "kernel.h"

namespace fastrlhf {

namespace py = pybind11;

static Kernel* first = nullptr;  // constant-initialised, so ready before any kernel adds itself

void add_kernel(Kernel* kernel) {
  kernel->next = first;
  first = kernel;
}

static void call(const Kernel* kernel, const py::args& args) {
  Value values[32];
  const size_t n = std::strlen(kernel->signature);
  if (args.size() != n || n > 32)
    throw py::type_error(std::string(kernel->name) + " takes " + std::to_string(n) +
                         " arguments, got " + std::to_string(args.size()));
  for (size_t i = 0; i < n; i++) {
    PyObject* argument = PyTuple_GET_ITEM(args.ptr(), i);
    if (kernel->signature[i] == 'd')
      values[i].d = PyFloat_AsDouble(argument);
    else
      values[i].i = PyLong_AsLongLong(argument);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  py::gil_scoped_release release;
  kernel->call(values);
}

}  // namespace fastrlhf
