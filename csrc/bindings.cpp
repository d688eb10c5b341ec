// The Python module dexkernels._C: what every operator's bind.cpp adds, and what the library says of itself.
#include <stdexcept>
#include <string>
#include <vector>

#include "common/binding.h"

namespace dex {
namespace {

// A function's own variable: it is there for the first Binding, in whatever order files are initialised.
std::vector<Binding::Define>& definitions() {
  static std::vector<Binding::Define> all;
  return all;
}

}  // namespace

Binding::Binding(Define define) {
  definitions().push_back(define);
}

void Binding::define_all(pybind11::module_& m) {
  for (const Define define : definitions()) define(m);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  int driver = 0;
  std::string reason = cudaGetErrorString(error);
  // The runtime calls a missing driver "insufficient"; version 0 tells the two apart.
  if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess) {
    reason = driver == 0 ? "no NVIDIA driver on this machine"
                         : "the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) + "." +
                               std::to_string(driver % 1000 / 10) + ", this library needs " +
                               std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  }
  if (error == cudaErrorNoKernelImageForDevice) reason += "; built for " DEX_ARCHITECTURES;
  throw std::runtime_error(std::string(what) + ": " + reason);
}

}  // namespace dex

PYBIND11_MODULE(_C, m) {
  m.attr("__version__") = DEX_VERSION;
  m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  m.attr("architectures") = DEX_ARCHITECTURES;
  dex::Binding::define_all(m);
}
