// The Python module dexkernels._C. Pointers come as integers; dexkernels/native.py is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "launchers.h"

namespace {

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

using Row = std::array<int64_t, 7>;  // see dex::group_ema_tensor

void group_ema(const std::vector<Row>& rows, double momentum, int64_t momentum_at, bool momentum_is_double,
               int64_t skip_at, int64_t stream) {
  std::vector<dex::GroupEmaTensor> tensors;
  tensors.reserve(rows.size());
  for (const Row& row : rows) tensors.push_back(dex::group_ema_tensor(row.data()));
  const dex::GroupEmaScalars scalars{momentum, reinterpret_cast<const void*>(momentum_at),
                                     reinterpret_cast<const bool*>(skip_at), momentum_is_double};
  check(dex::group_ema(tensors.data(), static_cast<int64_t>(tensors.size()), scalars,
                       reinterpret_cast<cudaStream_t>(stream)),
        "group_ema_");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.attr("__version__") = DEX_VERSION;
  m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  m.attr("architectures") = DEX_ARCHITECTURES;
  m.def("group_ema_", &group_ema, py::arg("rows"), py::arg("momentum"), py::arg("momentum_at"),
        py::arg("momentum_is_double"), py::arg("skip_at"), py::arg("stream"));
}
