// Instances of the forward kernel and their launch.
#include "attention_forward.cuh"
#include "launch.h"

namespace hmar {
namespace {

struct Instance {
  DType dtype;
  TileShape shape;
  void (*kernel)(AttentionForwardParams);
  int num_threads, shared_bytes;
};

template <class Tile>
constexpr Instance instance() {
  return {Tile::kType, {Tile::kHeadDim, Tile::kBlockM, Tile::kBlockN}, attention_forward_kernel<Tile>,
          Tile::kNumThreads, sizeof(typename Tile::Shared)};
}

// type, head dim, rows a tile, keys a block, warps, stages, blocks an SM (which bounds the registers)
const Instance INSTANCES[] = {
    instance<ForwardTile<DType::kBFloat16, 64, 64, 64, 4, 2, 4>>(),
    instance<ForwardTile<DType::kBFloat16, 64, 128, 64, 4, 2, 2>>(),
    instance<ForwardTile<DType::kBFloat16, 128, 64, 64, 4, 2, 2>>(),
    instance<ForwardTile<DType::kBFloat16, 128, 128, 32, 4, 2, 2>>(),
    instance<ForwardTile<DType::kFloat16, 64, 64, 64, 4, 2, 4>>(),
    instance<ForwardTile<DType::kFloat16, 64, 128, 64, 4, 2, 2>>(),
    instance<ForwardTile<DType::kFloat16, 128, 64, 64, 4, 2, 2>>(),
    instance<ForwardTile<DType::kFloat16, 128, 128, 32, 4, 2, 2>>(),
};

}  // namespace

std::vector<TileShape> attention_forward_tiles() {
  std::vector<TileShape> shapes;
  for (const Instance& instance : INSTANCES) {
    if (instance.dtype == DType::kBFloat16) shapes.push_back(instance.shape);
  }
  return shapes;
}

cudaError_t launch_attention_forward(AttentionForwardParams params, DType dtype, int head_dim, int tile_rows,
                                     cudaStream_t stream) {
  for (const Instance& instance : INSTANCES) {
    const TileShape& shape = instance.shape;
    if (instance.dtype != dtype || shape.head_dim != head_dim || shape.tile_rows != tile_rows) continue;
    const void* kernel = reinterpret_cast<const void*>(instance.kernel);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, instance.shared_bytes);
    if (error != cudaSuccess) return error;
    const unsigned num_blocks = static_cast<unsigned>(params.num_tiles) * params.batch_size * params.num_heads;
    if (num_blocks == 0) return cudaSuccess;
    void* arguments[] = {&params};
    return cudaLaunchKernel(kernel, num_blocks, instance.num_threads, arguments, instance.shared_bytes, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t load_attention_forward() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(INSTANCES[0].kernel));
}

}  // namespace hmar
