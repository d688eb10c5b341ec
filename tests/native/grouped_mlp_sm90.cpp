// csrc/grouped_mlp_sm90's boxes, ring and map shapes behind C functions. Compiled and loaded by
// test_grouped_mlp_sm90.py.
#include <cstdint>

#include "grouped_mlp_sm90/boxes.h"

extern "C" {

// sizes: E, S, images of the director, N, K. piece: expert, first, stop. boxes [MLP_TILE, 3]: log2, image, token.
void host_boxes(const int64_t* slot_order, const int64_t* offsets, const int64_t* sizes, const int32_t* piece,
                int32_t* boxes) {
  const dex::MlpSlots s = dex::mlp_slots(slot_order, offsets, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  for (int32_t row = 0; row < dex::MLP_TILE; ++row) {
    const dex::Box box = dex::box_at(s, {piece[0], piece[1], piece[2], 0}, row);
    boxes[3 * row] = box.log2, boxes[3 * row + 1] = box.image, boxes[3 * row + 2] = box.token;
  }
}

// places [count, 2]: stage and phase after 0, steps, 2 * steps, ... steps.
void host_ring(uint32_t steps, int64_t count, uint32_t* places) {
  dex::RingPlace at{0, 0};
  for (int64_t i = 0; i < count; ++i, at = dex::advance(at, steps)) {
    places[2 * i] = at.stage;
    places[2 * i + 1] = at.phase;
  }
}

// given: matrices, rows, width, stride of matrices, of rows, rows of a box. shape: sizes, strides, box.
void host_map_shape(const int64_t* given, uint64_t* shape) {
  const dex::MapShape s =
      dex::map_shape(given[0], given[1], given[2], given[3], given[4], static_cast<int32_t>(given[5]));
  for (int i = 0; i < 3; ++i) shape[i] = s.size[i], shape[5 + i] = s.box[i];
  shape[3] = s.stride[0], shape[4] = s.stride[1];
}

int host_shared() {
  return dex::SM90_SHARED;
}
}
