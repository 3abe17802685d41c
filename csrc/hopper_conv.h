// Host side of the Hopper convolutions: which kernels there are, what they are told, and their launch (hopper_conv.cu).
#pragma once

#ifndef HMAR_ON_CPU
#include <cuda_runtime_api.h>
#endif

#include <vector>

#include "hopper_params.h"

namespace hmar {

// One compiled kernel, for both dtypes. Its index in the list names it.
struct HopperConvKernel {
  bool doubled;  // see Resolution in hopper_conv.cuh
  int blocks;  // of 64 positions, for each of two warpgroups
  int stages, map_stages;
  int shared_bytes;
};

// x [N, H, W, C], channels in multiples of 8; weight [O, 3, 3, C], or [O, 4, 4, C] of a kernel that doubles the sides.
struct HopperConvShape {
  DType dtype;
  int num_images, height, width, in_channels, out_channels;
};

// Boxes are 64 bytes wide in shared memory and swizzled.
inline MapGeometry conv_x_geometry(const HopperConvShape& shape, const HopperConvKernel& kernel) {
  const auto images = uint64_t(shape.num_images), height = uint64_t(shape.height), width = uint64_t(shape.width);
  const auto channels = uint64_t(shape.in_channels);
  return {4,
          {channels, width, height, images},
          {2 * channels, 2 * channels * width, 2 * channels * width * height},
          {kConvChannels, kPatchColumns + 2, uint32_t(kBlockSide * kernel.blocks) + 2, 1}};
}

inline MapGeometry conv_weight_geometry(const HopperConvShape& shape, const HopperConvKernel& kernel) {
  const auto channels = uint64_t(shape.in_channels), taps = uint64_t(kernel.doubled ? 16 : 9);
  return {3,
          {channels, taps, uint64_t(shape.out_channels)},
          {2 * channels, 2 * channels * taps},
          {kConvChannels, 1, kConvColumns}};
}

// What a kernel writes, contiguous; means and deviations null for none.
struct HopperConvOutput {
  void* out;
  float* means;
  float* deviations;
};

// All but the tensor maps. bias: null for none.
inline HopperConvParams conv_params(const HopperConvShape& shape, const HopperConvKernel& kernel, const void* bias,
                                    const HopperConvOutput& output) {
  const auto divided = [](int a, int b) { return (a + b - 1) / b; };
  const int factor = kernel.doubled ? 2 : 1, row = factor * shape.width * shape.out_channels;
  HopperConvParams params{};
  params.out = output.out, params.bias = bias;
  params.means = output.means, params.deviations = output.deviations;
  params.image_stride = int64_t{row} * factor * shape.height;
  params.row_stride = factor * row, params.column_stride = factor * shape.out_channels;
  params.parity_row_stride = row, params.parity_column_stride = shape.out_channels;
  params.height = shape.height, params.width = shape.width;
  params.num_chunks = divided(shape.in_channels, kConvChannels);
  params.out_channels = shape.out_channels;
  params.num_patch_rows = divided(shape.height, kBlockSide * kernel.blocks);
  params.num_patch_columns = divided(shape.width, kPatchColumns);
  params.num_column_tiles = divided(shape.out_channels, kConvColumns);
  params.num_items = shape.num_images * params.num_patch_rows * params.num_patch_columns * params.num_column_tiles *
                     factor * factor;
  return params;
}

#ifndef HMAR_ON_CPU
std::vector<HopperConvKernel> hopper_conv_kernels();

// Puts a kernel on a stream: no synchronisation, no allocation, arguments already checked.
cudaError_t launch_hopper_conv(int kernel, const HopperConvShape& shape, const void* x, const void* weight,
                               const void* bias, const HopperConvOutput& output, cudaStream_t stream);
#endif

}  // namespace hmar
