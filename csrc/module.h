// What the two extension modules share: the kernels that have added themselves, and the call of one
// from Python.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>

#include "kernel.h"

namespace fastrlhf {

namespace py = pybind11;

static Kernel* first = nullptr;  // constant-initialised, so ready before any kernel adds itself

void add_kernel(Kernel* kernel) {
  kernel->next = first;
  first = kernel;
}

// Says what went wrong in a call, or nullptr; called after each where a module has set it.
static const char* (*failure)() = nullptr;

// In Python's own calling convention: pybind11's takes several times as long as a small kernel.
static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  const auto* kernel = static_cast<const Kernel*>(PyCapsule_GetPointer(self, nullptr));
  Value values[32];
  const auto wanted = static_cast<Py_ssize_t>(std::strlen(kernel->signature));
  if (n != wanted || n > 32)
    return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", kernel->name, wanted, n);
  for (Py_ssize_t i = 0; i < n; i++) {
    if (kernel->signature[i] == 'd')
      values[i].d = PyFloat_AsDouble(args[i]);
    else
      values[i].i = PyLong_AsLongLong(args[i]);
  }
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* state = PyEval_SaveThread();
  kernel->call(values);
  const char* failed = failure ? failure() : nullptr;
  PyEval_RestoreThread(state);
  if (failed) return PyErr_Format(PyExc_RuntimeError, "%s: %s", kernel->name, failed);
  Py_RETURN_NONE;
}

// The function that Python sees, which like the kernel is there until the process ends.
static py::object function_of(const Kernel* kernel) {
  const auto method = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
  auto* definition = new PyMethodDef{kernel->name, method, METH_FASTCALL, nullptr};
  const py::capsule self(kernel, static_cast<const char*>(nullptr));
  return py::reinterpret_steal<py::object>(PyCFunction_New(definition, self.ptr()));
}

}  // namespace fastrlhf
