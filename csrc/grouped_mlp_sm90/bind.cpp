// The launches of grouped_mlp for sm_90a in Python, with the arguments of those that they may replace.
#include <pybind11/stl.h>

#include <array>

#include "common/binding.h"
#include "grouped_mlp_sm90/launcher.h"

namespace {

namespace py = pybind11;

using Row = std::array<int64_t, 3>;    // an address, and two strides in elements
using Slots = std::array<int64_t, 7>;  // slot_order, offsets, E, S, images of the director, N, K

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

dex::MlpSlots slots(const Slots& s) {
  return dex::mlp_slots(at<const int64_t>(s[0]), at<const int64_t>(s[1]), s[2], s[3], s[4], s[5], s[6]);
}

dex::Images images(const Row& row) {
  return {at<const uint16_t>(row[0]), row[1], row[2]};
}

dex::Matrices matrices(const Row& row) {
  return {at<const uint16_t>(row[0]), row[1], row[2]};
}

cudaStream_t stream_at(int64_t stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

void fc1(const Row& x, const Row& weight, int64_t bias, int64_t z, int64_t a, const Slots& of, int32_t dim,
         int32_t hidden, bool bfloat16, int64_t stream) {
  const dex::Fc1 p{images(x), matrices(weight), at<const uint16_t>(bias), at<uint16_t>(z), at<uint16_t>(a), slots(of),
                   dim,       hidden};
  dex::check(dex::fc1_sm90(p, bfloat16, stream_at(stream)), "grouped_mlp, fc1 for sm_90a");
}

void to_hidden_grad(const Row& grad_out, const Row& weight, int64_t gates, int64_t z, const std::array<int64_t, 4>& to,
                    const Slots& of, int32_t dim, int32_t hidden, bool bfloat16, int64_t stream) {
  const dex::HiddenGrad p{images(grad_out),
                          matrices(weight),
                          at<const float>(gates),
                          at<const uint16_t>(z),
                          at<uint16_t>(to[0]),
                          at<uint16_t>(to[1]),
                          at<float>(to[2]),
                          at<float>(to[3]),
                          slots(of),
                          dim,
                          hidden};
  dex::check(dex::to_hidden_grad_sm90(p, bfloat16, stream_at(stream)), "grouped_mlp, to_hidden_grad for sm_90a");
}

const dex::Binding binding([](py::module_& m) {
  using py::arg;
  m.def("grouped_mlp_fc1_sm90", &fc1, arg("x"), arg("weight"), arg("bias"), arg("z"), arg("a"), arg("slots"),
        arg("dim"), arg("hidden"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_to_hidden_grad_sm90", &to_hidden_grad, arg("grad_out"), arg("weight"), arg("gates"), arg("z"),
        arg("to"), arg("slots"), arg("dim"), arg("hidden"), arg("bfloat16"), arg("stream"));
});

}  // namespace
