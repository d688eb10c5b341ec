// group_ema_ in Python. Pointers come as integers; dexkernels/ops/group_ema/cuda.py is its only caller.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/binding.h"
#include "group_ema/launcher.h"

namespace {

namespace py = pybind11;

using Row = std::array<int64_t, 7>;  // see dex::group_ema_tensor

void group_ema(const std::vector<Row>& rows, double momentum, int64_t momentum_at, bool momentum_is_double,
               int64_t skip_at, int64_t stream) {
  std::vector<dex::GroupEmaTensor> tensors;
  tensors.reserve(rows.size());
  for (const Row& row : rows) tensors.push_back(dex::group_ema_tensor(row.data()));
  const dex::GroupEmaScalars scalars{momentum, reinterpret_cast<const void*>(momentum_at),
                                     reinterpret_cast<const bool*>(skip_at), momentum_is_double};
  dex::check(dex::group_ema(tensors.data(), static_cast<int64_t>(tensors.size()), scalars,
                            reinterpret_cast<cudaStream_t>(stream)),
             "group_ema_");
}

const dex::Binding binding([](py::module_& m) {
  m.def("group_ema_", &group_ema, py::arg("rows"), py::arg("momentum"), py::arg("momentum_at"),
        py::arg("momentum_is_double"), py::arg("skip_at"), py::arg("stream"));
});

}  // namespace
