// Host side of the Hopper kernels: which tiles there are, and their launch. Implemented by hopper.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "hopper_params.h"

namespace hmar {

// One compiled kernel, for both dtypes. Its index in the list of its pass names it.
struct HopperTile {
  int head_dim;
  int groups;      // warpgroups that compute, 64 rows each
  int block_cols;  // columns a block
  int stages;      // blocks in shared memory
  int row_stages;  // jobs whose rows are in shared memory
  int overlap;     // forward only, see hopper_forward.cuh
  int blocks_per_sm;
  int shared_bytes;
};

struct HopperTensor {
  const void* data;
  Strides strides;
};

// What all passes are told: shapes, and the plan of the pass.
struct HopperShape {
  DType dtype;
  int head_dim, batch_size, num_heads, num_queries, num_keys;
  const int32_t* key_start;
  const int32_t* key_end;
  const int32_t* jobs;
  int32_t num_jobs;
  int32_t tail_heads;  // as in HopperWork
  int32_t* next_item;  // as in HopperWork
  bool set_zero;       // the counters have to be set to zero before the launch
  float scale;
};

std::vector<HopperTile> hopper_forward_tiles();
std::vector<HopperTile> hopper_dq_tiles();
std::vector<HopperTile> hopper_dkdv_tiles();
std::vector<HopperTile> hopper_backward_tiles();

cudaError_t launch_hopper_forward(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                                  HopperTensor out, float* lse_log2, const float* head_bounds, float logit_bound,
                                  cudaStream_t stream);
// delta: null where nobody asks for it. overlap: thread blocks may begin before the kernel queued before this one has ended. Until
// then dq alone is not written: that kernel must write nothing else of what this one reads or writes, its counters included.
cudaError_t launch_hopper_dq(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                             HopperTensor out, HopperTensor d_out, const float* lse_log2, const float* d_lse_log2, HopperTensor dq,
                             float* delta, bool overlap, cudaStream_t stream);
cudaError_t launch_hopper_dkdv(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                               HopperTensor d_out, const float* lse_log2, const float* delta, HopperTensor dk, HopperTensor dv,
                               cudaStream_t stream);
// Of the last num_last_heads heads, which are of one image, only dk and dv. Sums of the others take dq itself and num_slots of the
// gradients of those, at most three a head: rows of dq, dk and dv start at multiples of 16 bytes, and there are no fewer keys
// than queries. statistics: [num_slots, Lq]. After kNumQueues counters come two for each of all heads and of num_last_heads more,
// then two that are set to zero with these and left so, for the dq pass of the last heads.
cudaError_t launch_hopper_backward(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                                   HopperTensor out, HopperTensor d_out, const float* lse_log2, const float* d_lse_log2,
                                   HopperTensor dq, HopperTensor dk, HopperTensor dv, RowStatistics* statistics,
                                   int num_slots, int num_last_heads, cudaStream_t stream);

// Whether this build has code for the current device.
cudaError_t load_hopper();

}  // namespace hmar
