// What the sm_90a kernels are told: plain structs, filled by their .cu files and passed by value. Next: hopper_tile.cuh.
#pragma once

#include "params.h"

namespace hmar {

// cuda.h's CUtensorMap, named here so that no CUDA header is needed to compile the kernels.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// What a tensor map says, from the innermost dimension on. Strides in bytes, of all dimensions but the first.
struct MapGeometry {
  int rank;
  uint64_t sizes[4], strides[3];
  uint32_t box[4];
};

// A job of a plan: what the warpgroups of a block do together. Rows are queries in the forward and dq passes, keys in the
// dk/dv pass and the one-pass backward; columns are the others. Block b holds the columns from COLUMN_BEGIN + b * kBlockN on.
enum JobField {
  COLUMN_BEGIN,
  NUM_BLOCKS,
  GROUP_FIELDS,  // one GroupField after the other for each warpgroup
};
enum GroupField {
  ROW_BEGIN_OF_GROUP,  // its rows, at most 64
  ROW_END_OF_GROUP,
  BLOCK_BEGIN,         // blocks of which it sees a column
  BLOCK_END,
  FULL_BLOCK_BEGIN,    // blocks of which all its rows see all columns
  FULL_BLOCK_END,
  NUM_GROUP_FIELDS,
};
template <int kGroups>
constexpr int kJobInts = (GROUP_FIELDS + NUM_GROUP_FIELDS * kGroups + 3) / 4 * 4;

// What the passes share. One item is one job of one (batch, head). Items of a head follow each other, longest jobs first; but
// those of the last tail_heads heads follow job by job, so that the last ones of all are short.
struct HopperWork {
  const int32_t* key_start;  // [Lq]
  const int32_t* key_end;    // [Lq]
  const int32_t* jobs;       // [num_jobs, kJobInts]
  // Zero at the launch. Items beyond the first of each block are taken from the first of two counters; the second counts blocks
  // that have found no more, and the last of these sets both to zero. (The one-pass backward has kNumQueues, those of the heads,
  // which it leaves as they come out, and then two that it does not touch.)
  int32_t* next_item;
  int32_t num_jobs, num_items, num_heads;
  int32_t num_queries;
  int32_t tail_heads;  // at least 1; in the one-pass backward at most num_slots and 2 num_last_heads
  float scale;
};

struct HopperForwardParams {
  TensorMap q, k, v;  // boxes of 64 rows (q) and kBlockN rows (k, v), 64 columns
  void* out;          // [B, H, Lq, D]
  Strides out_strides;
  float* lse_log2;    // [B, H, Lq], contiguous: of the logits in log2 units, +inf for a query without keys
  const float* head_bounds;  // [H]: no |scale q k| of a head is larger; null where logit_bound says it for all heads
  float logit_bound;         // infinity when nothing is known
  HopperWork work;
};

// Of a query: what the forward saved, and sum(out * do) - dlse.
struct RowStatistics {
  float lse_log2, delta;
};

struct HopperDqParams {
  TensorMap q, k, v, out, d_out;
  const float* lse_log2;
  const float* d_lse_log2;  // [B, H, Lq], contiguous: the gradient of lse_log2; null for zeros
  void* dq;
  Strides dq_strides;
  float* delta;             // [B, H, Lq], written for the dk/dv pass; null where there is none
  HopperWork work;
};

struct HopperDkdvParams {
  TensorMap q, k, v, d_out;
  const float* lse_log2;
  const float* delta;
  void* dk;
  void* dv;
  Strides dk_strides, dv_strides;
  HopperWork work;
};

// How far a head has come, in the one-pass backward; zero at the launch. Of a number that no head has: `ready` counts chunks of the
// head that had its slot, whose sums are rounded.
struct HeadProgress {
  int32_t ready;  // chunks of queries whose sums are zero and whose statistics are written
  int32_t done;   // jobs whose products are in the sums
};
constexpr int kChunkQueries = 32;
constexpr int kSumsBoxRows = 16;  // of a warp
constexpr int kNumQueues = 4;  // counters before those of the heads: next_item, next_chunk, next_first_chunk; one is not used

// Where the sums of dq may lie.
enum SumsTensor { IN_DQ, IN_DK, IN_DV, NUM_SUMS_TENSORS };

struct HopperBackwardParams {
  TensorMap q, k, v, d_out;
  TensorMap sums[NUM_SUMS_TENSORS];  // float32 [batch, head, Lq, D / 2] in rows of as many bytes, boxes of 16 rows
  const void* out;
  const void* d_out_rows;     // what d_out describes
  Strides out_strides, d_out_strides;
  const float* lse_log2;
  const float* d_lse_log2;    // [B, H, Lq], contiguous; null for zeros
  void* dq;
  void* dk;
  void* dv;
  Strides dq_strides, dk_strides, dv_strides;
  RowStatistics* statistics;  // [num_slots, Lq]
  HeadProgress* progress;     // [B * H + num_last_heads]
  int32_t* next_chunk;        // zero at the launch
  int32_t* next_first_chunk;  // the same
  int32_t num_slots, num_chunks;  // heads under way at most; chunks of queries of a head
  int32_t num_first_heads;        // those that the first jobs of all blocks belong to, at most num_slots
  int32_t num_batch_heads;        // B * H
  int32_t num_last_heads;         // the last heads, which get no dq; all of the last image
  int32_t first_slot;             // of head 0
  HopperWork work;
};

// Of an item of a convolution: output channels, columns of its patch, which has a multiple of kBlockSide rows. Of a step: input
// channels.
constexpr int kConvColumns = 160, kPatchColumns = 16, kBlockSide = 8, kConvChannels = 32;

// A convolution of channels-last maps (hopper_conv.cuh). Strides in elements, of the output positions of one parity.
struct HopperConvParams {
  TensorMap x;         // boxes of 32 channels and a patch of positions with its neighbours
  TensorMap weight;    // boxes of 32 channels, one tap and 160 output channels
  void* out;           // [N, H, W, O], or [N, 2 H, 2 W, O]
  const void* bias;    // [O], or null
  // What is added to the convolution before it is rounded. Not where sides are doubled.
  const void* residual;  // [N, H, W, O], or null
  const void* shift;     // [O], or null; only with a residual
  // [N, C]: the convolution is of silu(factors x + offsets), rounded as x is, with zeros around it. Null: of x. Not where sides
  // are doubled.
  const float* factors;
  const float* offsets;
  float* means;        // [N, chunks, O] of the output as it is rounded, or null: for maps of whole patches.
  float* deviations;   // the same: sums of squared distances from the mean. A chunk is what a warpgroup has of an item
  int64_t image_stride;
  int32_t row_stride, column_stride;
  int32_t parity_row_stride, parity_column_stride;
  int32_t height, width;  // of x
  int32_t num_chunks;     // of 32 input channels
  int32_t in_channels, out_channels;
  int32_t num_patch_rows, num_patch_columns, num_column_tiles;
  int32_t num_items;
};

// Of a linear layer of few rows: inputs a step, outputs of a block, and blocks of a cluster, at most: what every GPU can place.
constexpr int kLinearInputs = 64, kLinearFeatures = 64, kMaxLinearSplits = 8;

// Of a row's 64 numbers from a multiple of 64 on, or as many as there are.
struct alignas(8) TileStatistics {
  float mean, squares;  // squares: the sum of squared distances from the mean
};

// A norm of the rows of x before a layer: h = LN(x) (1 + scale) + shift.
struct RowsNorm {
  const TileStatistics* statistics;  // of x, [num_rows, tiles]
  const void* scale;                 // [images, num_inputs], whose rows start at multiples of 16 bytes
  const void* shift;
  int64_t scale_stride, shift_stride;
  float eps;
};

// Outputs of a product of few rows: gelu(h W^T + bias), or residual + gate of that. Numbers are of the kernel's type where
// nothing is said.
struct RowsOutput {
  const void* bias;      // [num_outputs], or null
  const void* residual;  // [num_rows, num_outputs], float32 or of the kernel's type, or null
  const void* gate;      // [images, num_outputs], with a residual
  void* y;               // [num_rows, num_outputs], of the residual's type where there is one
  TileStatistics* statistics;  // of y, [num_rows, tiles], or null
  int64_t gate_stride;
  int32_t num_rows, num_outputs;
  int32_t image_rows;  // rows of an image
  bool float_residual, gelu;
};

// A linear layer of few rows (linear_rows.cuh).
struct LinearRowsParams {
  TensorMap x_map;   // of x, where there is no norm: boxes of 64 inputs and the kernel's rows
  TensorMap weight;  // [num_outputs, num_inputs], boxes of 64 inputs and 64 features
  const void* x;     // [num_rows, num_inputs], with a norm float32 or of the kernel's type
  RowsNorm norm;
  RowsOutput out;
  int32_t num_inputs;
  int32_t num_chunks;  // of 64 inputs
  bool float_x;
};

// The products of a transformer block, and the vectors of an image that surround them, as modulation gives them.
enum BlockLayer { QKV, PROJ, FC1, FC2, NUM_BLOCK_LAYERS };
enum BlockVector { GATE_ATTENTION, GATE_MLP, SCALE_ATTENTION, SCALE_MLP, SHIFT_ATTENTION, SHIFT_MLP, NUM_BLOCK_VECTORS };

// Of one block, in global memory.
struct BlockWeights {
  TensorMap layers[NUM_BLOCK_LAYERS];        // [outputs, inputs], boxes of 64 inputs and 64 features
  const void* biases[NUM_BLOCK_LAYERS];      // [outputs], of the kernel's type; null for none
  const float *q_bias, *v_bias, *log_scale;  // [width], [width], [heads]
};

constexpr int kMaxRowBlocks = 64, kBlockHeadDim = 64;

// Transformer blocks one after the other, for few rows of images that are attended each by itself (block_rows.cuh).
struct BlockRowsParams {
  const BlockWeights* weights;                            // [num_blocks]
  const void* vectors[kMaxRowBlocks][NUM_BLOCK_VECTORS];  // [images, width], of the kernel's type, 16-byte aligned rows
  const float* x;              // [num_rows, width]
  float* y;                    // the same
  TileStatistics* statistics;  // of y, [num_rows, width / 64]
  void* qkv;                   // [num_rows, 3 width], for use meanwhile
  void* hidden;                // [num_rows, the larger of both widths], the same
  // Zero at the launch, and left so: blocks that have written outputs, and those that have ended.
  int32_t* counters;
  int64_t vector_stride;
  float max_log_scale, eps;
  int32_t num_rows, image_rows, num_blocks;
  int32_t width, hidden_width;  // multiples of 64, at least kBlockSplits times
};

// Rows start at multiples of 16 bytes.
struct NormRowsParams {
  const void* x;      // [rows, num_inputs], float32 or of the kernel's type
  const void* scale;  // [images, num_inputs]
  const void* shift;
  void* h;            // [rows, num_inputs]
  int64_t scale_stride, shift_stride;
  int32_t num_inputs;  // a multiple of 8, at most 8192
  int32_t image_rows;
  float eps;
  bool float_x;
};

}  // namespace hmar
