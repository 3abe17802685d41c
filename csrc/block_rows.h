// Host side of the kernel of transformer blocks for few rows: the table of weights, and the launch (block_rows.cu).
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "hopper_params.h"

namespace hmar {

// Addresses on a device of one block's weights, contiguous; null for no bias.
struct BlockTensors {
  const void* weights[NUM_BLOCK_LAYERS];
  const void* biases[NUM_BLOCK_LAYERS];
  const float *q_bias, *v_bias, *log_scale;
};

// Rows of x, at most, of the kernels, the same for both types.
std::vector<int> block_rows_kernels();

// What goes to `BlockRowsParams::weights`.
cudaError_t describe_block(BlockWeights* to, DType dtype, const BlockTensors& tensors, int width, int hidden_width);

// Puts a kernel on a stream: no synchronisation, no allocation, arguments already checked. kernel_rows: of a kernel, at least
// as many as there are; cudaErrorInvalidValue where there is no such kernel. cudaErrorCooperativeLaunchTooLarge where its
// blocks cannot all be on the device at once.
cudaError_t launch_block_rows(const BlockRowsParams& params, DType dtype, int kernel_rows, cudaStream_t stream);

}  // namespace hmar
