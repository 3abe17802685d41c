// Runs csrc/attention_forward.cuh, as it stands, on the CPU; test_cuda_build.py loads this through ctypes.
#include "attention_forward.cuh"

using namespace hmar;

namespace {

template <class Tile>
const char* run(const AttentionForwardParams& params, Block& block, bool last_warp_first) {
  static_assert(sizeof(typename Tile::Shared) <= SHARED_BYTES);
  block.kernel = [&] { attention_forward_kernel<Tile>(params); };
  const unsigned num_blocks = params.num_tiles * params.batch_size * params.num_heads;
  for (blockIdx.x = 0; blockIdx.x < num_blocks && !block.failure; ++blockIdx.x) {
    run_block(block, Tile::kNumThreads, last_warp_first);
  }
  return block.failure;
}

}  // namespace

// Returns what went wrong, or null. `readable` holds begin and end of the tensors q, k and v.
extern "C" const char* attention_forward_on_cpu(const AttentionForwardParams* params, int head_dim, int tile_rows,
                                                const uint8_t* const* readable, bool copies_at_once,
                                                bool last_warp_first) {
  Block block;
  block.copies_at_once = copies_at_once;
  for (int i = 0; i < 3; ++i) block.readable.emplace_back(readable[2 * i], readable[2 * i + 1]);
  constexpr DType kType = DType::kBFloat16;
  if (head_dim == 64 && tile_rows == 64) {
    return run<ForwardTile<kType, 64, 64, 64, 4, 2, 1>>(*params, block, last_warp_first);
  }
  if (head_dim == 64 && tile_rows == 128) {
    return run<ForwardTile<kType, 64, 128, 64, 4, 3, 1>>(*params, block, last_warp_first);
  }
  if (head_dim == 128 && tile_rows == 64) {
    return run<ForwardTile<kType, 128, 64, 64, 4, 2, 1>>(*params, block, last_warp_first);
  }
  if (head_dim == 128 && tile_rows == 128) {
    return run<ForwardTile<kType, 128, 128, 32, 4, 2, 1>>(*params, block, last_warp_first);
  }
  return "no such tile";
}
