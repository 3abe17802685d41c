// Host functions that put a kernel on a stream: no synchronisation, no allocation, arguments already checked.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "params.h"

namespace hmar {

struct TileShape {
  int head_dim, tile_rows, block_keys;
};

// What launch_attention_forward can run, the same for both types.
std::vector<TileShape> attention_forward_tiles();

// tile_rows: at least the rows of any tile in the plan. cudaErrorInvalidValue for a shape that has no kernel.
cudaError_t launch_attention_forward(AttentionForwardParams params, DType dtype, int head_dim, int tile_rows,
                                     cudaStream_t stream);

// Whether this build holds code for the current device.
cudaError_t load_attention_forward();

}  // namespace hmar
