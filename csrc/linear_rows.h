// Host side of the kernels for few rows: what they are told, and their launch (linear_rows.cu).
#pragma once

#ifndef HMAR_ON_CPU
#include <cuda_runtime_api.h>
#endif

#include <vector>

#include "hopper_params.h"

namespace hmar {

// A call, contiguous; addresses and types as in LinearRowsParams. num_inputs: a multiple of 8.
struct LinearRows {
  DType dtype;
  const void* x;
  RowsNorm norm;  // of nulls for none
  const void* weight;
  const void* bias;
  const void* residual;
  const void* gate;
  void* y;
  TileStatistics* statistics;
  int64_t gate_stride;
  int num_rows, num_inputs, num_outputs, image_rows;
  bool float_x, float_residual, gelu;
};

inline int divided(int a, int b) { return (a + b - 1) / b; }

// Boxes are 128 bytes wide in shared memory and swizzled.
inline MapGeometry linear_geometry(int num_rows, int num_inputs, int box_rows) {
  return {2,
          {uint64_t(num_inputs), uint64_t(num_rows)},
          {2 * uint64_t(num_inputs)},
          {uint32_t{kLinearInputs}, uint32_t(box_rows)}};
}

// All but the tensor maps.
inline LinearRowsParams linear_rows_params(const LinearRows& call) {
  LinearRowsParams params{};
  params.x = call.x, params.norm = call.norm, params.float_x = call.float_x;
  params.num_inputs = call.num_inputs, params.num_chunks = divided(call.num_inputs, kLinearInputs);
  params.out = {call.bias,     call.residual,    call.gate,       call.y,          call.statistics,    call.gate_stride,
                call.num_rows, call.num_outputs, call.image_rows, call.float_residual, call.gelu};
  return params;
}

// Among how many blocks K is divided: as many as fit on the multiprocessors at once.
// NOTE: a power of two, so that clusters leave none of a GPC's 16 or 18 multiprocessors without one that would fit.
inline int linear_splits(int num_tiles, int num_chunks, int num_sms) {
  int splits = 1;
  while (2 * splits <= kMaxLinearSplits && 2 * splits <= num_chunks && 2 * splits * num_tiles <= num_sms) splits *= 2;
  return splits;
}

#ifndef HMAR_ON_CPU
// Rows of x, at most, of the kernels without a norm, the same for both types.
std::vector<int> linear_rows_kernels();

// Put a kernel on a stream: no synchronisation, no allocation, arguments already checked. kernel_rows: of a kernel, at least as
// many as there are; cudaErrorInvalidValue where there is no such kernel. overlap: it may start before the end of the one
// before it.
cudaError_t launch_linear_rows(const LinearRows& call, int kernel_rows, bool overlap, cudaStream_t stream);
cudaError_t launch_norm_rows(NormRowsParams params, DType dtype, int num_rows, bool overlap, cudaStream_t stream);
#endif

}  // namespace hmar
