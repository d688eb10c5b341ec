// Prints CuTe's layouts as tables of numbers, one a line: name, then the values. test_layouts.py compares with them.
#include <cstdio>

#include <cute/arch/mma_sm80.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

// Of every thread, then value, the index of its element: row + rows * column.
template <class Layout>
void print_fragment(const char* name, Layout layout) {
  std::printf("%s", name);
  for (int thread = 0; thread < int(size<0>(layout)); ++thread)
    for (int value = 0; value < int(size<1>(layout)); ++value) std::printf(" %d", int(layout(thread, value)));
  std::printf("\n");
}

// Of every row, then column, the offset in bytes; before them the sizes, and the leading and stride byte offsets (in units
// of 16 bytes) and the layout type of the descriptor that CuTe makes for the first 16 of K.
template <SM90::GMMA::Major MAJOR, class Atom, int ROWS, int DEPTH>
void print_operand(const char* name) {
  auto layout = tile_to_shape(Atom{}, Shape<Int<ROWS>, Int<DEPTH>>{});
  auto tensor = make_tensor(make_smem_ptr(static_cast<bfloat16_t*>(nullptr)), layout);
  auto first = local_tile(tensor, Shape<Int<ROWS>, _16>{}, make_coord(0, 0));
  const GmmaDescriptor descriptor = SM90::GMMA::make_gmma_desc<MAJOR>(first);
  std::printf("%s %d %d %d %d %d", name, ROWS, DEPTH, int(descriptor.bitfield.leading_byte_offset_),
              int(descriptor.bitfield.stride_byte_offset_), int(descriptor.bitfield.layout_type_));
  // As it stands the layout's swizzle is one of addresses; this is the same of elements.
  auto of_elements = as_position_independent_swizzle_layout(layout);
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < DEPTH; ++k) std::printf(" %d", int(of_elements(row, k)) * 2);
  std::printf("\n");
}

int main() {
  using Mma = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  print_fragment("mma_a", Mma::ALayout{});
  print_fragment("mma_b", Mma::BLayout{});
  print_fragment("mma_c", Mma::CLayout{});
  print_fragment("wgmma_c_8", SM90::GMMA::CLayout_64x8{});
  print_fragment("wgmma_c_128", SM90::GMMA::CLayout_64x128{});
  print_fragment("wgmma_c_256", SM90::GMMA::CLayout_64x256{});
  print_fragment("wgmma_a", SM90::GMMA::ALayout_64x16{});
  print_fragment("ldmatrix_1", Copy_Traits<SM75_U32x1_LDSM_N>::DstLayout{});
  print_fragment("ldmatrix_4", Copy_Traits<SM75_U32x4_LDSM_N>::DstLayout{});
  print_fragment("ldmatrix_4_trans", Copy_Traits<SM75_U16x8_LDSM_T>::DstLayout{});
  print_fragment("ldmatrix_4_from", Copy_Traits<SM75_U32x4_LDSM_N>::SrcLayout{});
  using T = bfloat16_t;
  constexpr auto K = SM90::GMMA::Major::K, MN = SM90::GMMA::Major::MN;
  print_operand<K, SM90::GMMA::Layout_K_SW128_Atom<T>, 256, 64>("k_128");
  print_operand<K, SM90::GMMA::Layout_K_SW64_Atom<T>, 64, 64>("k_64");
  print_operand<K, SM90::GMMA::Layout_K_SW32_Atom<T>, 64, 32>("k_32");
  print_operand<K, SM90::GMMA::Layout_K_INTER_Atom<T>, 64, 32>("k_0");
  print_operand<MN, SM90::GMMA::Layout_MN_SW128_Atom<T>, 256, 64>("mn_128");
  print_operand<MN, SM90::GMMA::Layout_MN_SW128_Atom<T>, 64, 64>("mn_128_one");
  print_operand<MN, SM90::GMMA::Layout_MN_SW64_Atom<T>, 64, 32>("mn_64");
  print_operand<MN, SM90::GMMA::Layout_MN_SW32_Atom<T>, 64, 32>("mn_32");
}
