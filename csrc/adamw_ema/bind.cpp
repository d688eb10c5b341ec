// adamw_ema_ in Python. Pointers come as integers; dexkernels/ops/adamw_ema/cuda.py is its only caller.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "adamw_ema/launcher.h"
#include "common/binding.h"

namespace {

namespace py = pybind11;

using Row = std::array<int64_t, dex::ADAMW_ROW>;  // see dex::adamw_tensor

void adamw_ema(const std::vector<Row>& rows, const std::array<double, 5>& rule, int64_t momentum_at, int64_t clip_at,
               int64_t skip_at, int64_t stream) {
  std::vector<dex::AdamwTensor> tensors;
  tensors.reserve(rows.size());
  for (const Row& row : rows) tensors.push_back(dex::adamw_tensor(row.data()));
  const dex::AdamwScalars scalars{reinterpret_cast<const double*>(momentum_at),
                                  reinterpret_cast<const float*>(clip_at),
                                  reinterpret_cast<const bool*>(skip_at),
                                  static_cast<float>(rule[0]),
                                  static_cast<float>(rule[1]),
                                  static_cast<float>(rule[2]),
                                  static_cast<float>(rule[3]),
                                  static_cast<float>(rule[4])};
  dex::check(dex::adamw_ema(tensors.data(), static_cast<int64_t>(tensors.size()), scalars,
                            reinterpret_cast<cudaStream_t>(stream)),
             "adamw_ema_");
}

const dex::Binding binding([](py::module_& m) {
  m.def("adamw_ema_", &adamw_ema, py::arg("rows"), py::arg("rule"), py::arg("momentum_at"), py::arg("clip_at"),
        py::arg("skip_at"), py::arg("stream"));
});

}  // namespace
