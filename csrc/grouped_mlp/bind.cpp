// The launches of grouped_mlp in Python. Pointers come as integers; dexkernels/ops/grouped_mlp/cuda.py is their only
// caller.
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "common/binding.h"
#include "grouped_mlp/launcher.h"

namespace {

namespace py = pybind11;

using Row = std::array<int64_t, 3>;    // an address, and two strides in elements
using Slots = std::array<int64_t, 7>;  // slot_order, offsets, E, S, images of the director, N, K

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

dex::Images images(const Row& row) {
  return {at<const uint16_t>(row[0]), row[1], row[2]};
}

dex::Matrices matrices(const Row& row) {
  return {at<const uint16_t>(row[0]), row[1], row[2]};
}

dex::MlpSlots slots(const Slots& s) {
  return dex::mlp_slots(at<const int64_t>(s[0]), at<const int64_t>(s[1]), s[2], s[3], s[4], s[5], s[6]);
}

cudaStream_t stream_at(int64_t stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const char* launch) {
  dex::check(error, (std::string("grouped_mlp, ") + launch).c_str());
}

void fc1(const Row& x, const Row& weight, int64_t bias, int64_t z, int64_t a, const Slots& of, int32_t dim,
         int32_t hidden, bool bfloat16, int64_t stream) {
  const dex::Fc1 p{images(x), matrices(weight), at<const uint16_t>(bias), at<uint16_t>(z), at<uint16_t>(a), slots(of),
                   dim,       hidden};
  check(dex::fc1(p, bfloat16, stream_at(stream)), "fc1");
}

void to_slots(int64_t rows, const Row& weight, bool transposed, int64_t bias, int64_t out, int64_t director_out,
              const Slots& of, const std::array<int32_t, 2>& sizes, bool bfloat16, int64_t stream) {
  const dex::ToSlots p{at<const uint16_t>(rows), matrices(weight), at<const uint16_t>(bias), at<uint16_t>(out),
                       at<uint16_t>(director_out), slots(of), sizes[0], sizes[1]};
  check(dex::to_slots(p, transposed, bfloat16, stream_at(stream)), "to_slots");
}

void combine(int64_t by_slot, int64_t gates, int64_t out, int64_t count, int64_t size, int32_t top_k, bool bfloat16,
             int64_t stream) {
  const dex::Combine p{at<const uint16_t>(by_slot), at<const float>(gates), at<uint16_t>(out), count, size, top_k};
  check(dex::combine(p, bfloat16, stream_at(stream)), "combine");
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
  check(dex::to_hidden_grad(p, bfloat16, stream_at(stream)), "to_hidden_grad");
}

void image_sum(const Row& grad_out, int64_t sums, int64_t count, int32_t tokens, int32_t dim, bool bfloat16,
               int64_t stream) {
  const dex::ImageSum p{images(grad_out), at<float>(sums), count, tokens, dim};
  check(dex::image_sum(p, bfloat16, stream_at(stream)), "image_sum");
}

void gate_grad(int64_t gate_parts, int64_t sums, int64_t bias, int64_t dgates, const Slots& of, int32_t num_parts,
               int32_t dim, bool bfloat16, int64_t stream) {
  const dex::GateGrad p{at<const float>(gate_parts), at<const float>(sums), at<const uint16_t>(bias),
                        at<float>(dgates), slots(of), num_parts, dim};
  check(dex::gate_grad(p, bfloat16, stream_at(stream)), "gate_grad");
}

template <cudaError_t (*LAUNCH)(const dex::BiasGrad&, bool, cudaStream_t)>
void bias_grad(int64_t parts, int64_t gates, int64_t out, const Slots& of, int32_t width, bool float_out, bool bfloat16,
               int64_t stream) {
  const dex::BiasGrad p{at<const float>(parts), at<const float>(gates), at<void>(out), slots(of), width, float_out};
  check(LAUNCH(p, bfloat16, stream_at(stream)), "bias_grad");
}

void weight_grad(const Row& gathered, bool gather_left, int64_t rows, int64_t out, int64_t parts, const Slots& of,
                 const std::array<int32_t, 3>& sizes, bool float_out, bool bfloat16, int64_t stream) {
  const dex::WeightGrad p{images(gathered), at<const uint16_t>(rows), at<void>(out), at<float>(parts), slots(of),
                          sizes[0],         sizes[1],                 sizes[2],      float_out};
  check(dex::weight_grad(p, gather_left, bfloat16, stream_at(stream)), "weight_grad");
}

const dex::Binding binding([](py::module_& m) {
  using py::arg;
  m.def("grouped_mlp_fc1", &fc1, arg("x"), arg("weight"), arg("bias"), arg("z"), arg("a"), arg("slots"), arg("dim"),
        arg("hidden"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_to_slots", &to_slots, arg("rows"), arg("weight"), arg("transposed"), arg("bias"), arg("out"),
        arg("director_out"), arg("slots"), arg("sizes"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_combine", &combine, arg("by_slot"), arg("gates"), arg("out"), arg("images"), arg("size"),
        arg("top_k"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_to_hidden_grad", &to_hidden_grad, arg("grad_out"), arg("weight"), arg("gates"), arg("z"),
        arg("to"), arg("slots"), arg("dim"), arg("hidden"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_image_sum", &image_sum, arg("grad_out"), arg("sums"), arg("images"), arg("tokens"), arg("dim"),
        arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_gate_grad", &gate_grad, arg("gate_parts"), arg("sums"), arg("bias"), arg("dgates"), arg("slots"),
        arg("num_parts"), arg("dim"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_bias1_grad", &bias_grad<&dex::bias1_grad>, arg("parts"), arg("gates"), arg("out"), arg("slots"),
        arg("width"), arg("float_out"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_bias2_grad", &bias_grad<&dex::bias2_grad>, arg("parts"), arg("gates"), arg("out"), arg("slots"),
        arg("width"), arg("float_out"), arg("bfloat16"), arg("stream"));
  m.def("grouped_mlp_weight_grad", &weight_grad, arg("gathered"), arg("gather_left"), arg("rows"), arg("out"),
        arg("parts"), arg("slots"), arg("sizes"), arg("float_out"), arg("bfloat16"), arg("stream"));
});

}  // namespace
