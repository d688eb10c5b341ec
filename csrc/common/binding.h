// How an operator adds its functions to the Python module: a Binding at namespace scope in its bind.cpp.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

namespace dex {

class Binding {
 public:
  using Define = void (*)(pybind11::module_&);
  // Called while the library is loaded, before Python sees the module.
  explicit Binding(Define define);
  // Adds what all operators define.
  static void define_all(pybind11::module_& m);
};

// Throws what Python sees as a RuntimeError, unless error is cudaSuccess.
void check(cudaError_t error, const char* what);

}  // namespace dex
