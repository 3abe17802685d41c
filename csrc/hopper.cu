// Instances of the Hopper kernels and their launch. Everything else is in hopper_*.cuh.
#include "hopper.h"

#include <algorithm>
#include <array>

#include "hopper_backward.cuh"
#include "hopper_backward_dkdv.cuh"
#include "hopper_backward_dq.cuh"
#include "hopper_forward.cuh"
#include "launch_kernel.h"
#include "tensor_map.h"

namespace hmar {
namespace {

template <class Params>
struct Instance {
  HopperTile tile;
  void (*float16)(Params);
  void (*bfloat16)(Params);
  int num_threads;
};

// head dim, warpgroups, columns a block, stages, (forward: overlap; backward: row stages), blocks an SM
template <int kHeadDim, int kGroups, int kBlockN, int kStages, Overlap kOverlap, int kBlocksPerSM>
constexpr Instance<HopperForwardParams> forward() {
  using Half = HopperForwardTile<DType::kFloat16, kHeadDim, kGroups, kBlockN, kStages, kOverlap, kBlocksPerSM>;
  using Brain = HopperForwardTile<DType::kBFloat16, kHeadDim, kGroups, kBlockN, kStages, kOverlap, kBlocksPerSM>;
  return {{kHeadDim, kGroups, kBlockN, kStages, Half::kRowStages, int(kOverlap), kBlocksPerSM,
           sizeof(typename Half::Shared)},
          hopper_forward_kernel<Half>, hopper_forward_kernel<Brain>, Half::kNumThreads};
}

template <class Half, class Params>
constexpr Instance<Params> backward_instance(void (*float16)(Params), void (*bfloat16)(Params)) {
  return {{Half::kHeadDim, Half::kGroups, Half::kBlockN, Half::kStages, Half::kRowStages, 0, Half::kBlocksPerSM,
           sizeof(typename Half::Shared)},
          float16, bfloat16, Half::kNumThreads};
}

template <int kHeadDim, int kGroups, int kBlockN, int kStages, int kRowStages, int kBlocksPerSM>
constexpr Instance<HopperDqParams> dq() {
  using Half = HopperDqTile<DType::kFloat16, kHeadDim, kGroups, kBlockN, kStages, kRowStages, kBlocksPerSM>;
  using Brain = HopperDqTile<DType::kBFloat16, kHeadDim, kGroups, kBlockN, kStages, kRowStages, kBlocksPerSM>;
  return backward_instance<Half>(hopper_dq_kernel<Half>, hopper_dq_kernel<Brain>);
}

template <int kHeadDim, int kGroups, int kBlockN, int kStages, int kRowStages, int kBlocksPerSM>
constexpr Instance<HopperDkdvParams> dkdv() {
  using Half = HopperDkdvTile<DType::kFloat16, kHeadDim, kGroups, kBlockN, kStages, kRowStages, kBlocksPerSM>;
  using Brain = HopperDkdvTile<DType::kBFloat16, kHeadDim, kGroups, kBlockN, kStages, kRowStages, kBlocksPerSM>;
  return backward_instance<Half>(hopper_dkdv_kernel<Half>, hopper_dkdv_kernel<Brain>);
}

template <int kHeadDim, int kGroups, int kBlockN, int kStages, int kRowStages, int kBlocksPerSM>
constexpr Instance<HopperBackwardParams> backward() {
  using Half = HopperBackwardTile<DType::kFloat16, kHeadDim, kGroups, kBlockN, kStages, kRowStages, kBlocksPerSM>;
  using Brain = HopperBackwardTile<DType::kBFloat16, kHeadDim, kGroups, kBlockN, kStages, kRowStages, kBlocksPerSM>;
  return backward_instance<Half>(hopper_backward_kernel<Half>, hopper_backward_kernel<Brain>);
}

// What hopper.py's tile table names.
const Instance<HopperForwardParams> FORWARD[] = {
    forward<64, 4, 64, 5, Overlap::kBehind, 1>(),
    forward<64, 4, 96, 3, Overlap::kNone, 1>(),
    forward<64, 3, 128, 2, Overlap::kNone, 1>(),
    forward<128, 2, 64, 3, Overlap::kInTurn, 1>(),
    forward<128, 2, 128, 2, Overlap::kInTurn, 1>(),
};
const Instance<HopperDqParams> DQ[] = {
    dq<64, 3, 64, 4, 2, 1>(),
    dq<128, 2, 64, 3, 1, 1>(),
};
const Instance<HopperDkdvParams> DKDV[] = {
    dkdv<64, 1, 64, 4, 2, 2>(),
    dkdv<64, 2, 64, 4, 2, 1>(),
    dkdv<128, 2, 64, 2, 1, 1>(),
    dkdv<128, 2, 64, 2, 2, 1>(),
};

const Instance<HopperBackwardParams> BACKWARD[] = {
    backward<64, 2, 64, 4, 2, 1>(),
    backward<128, 2, 64, 3, 1, 1>(),
};

template <class Params, size_t kCount>
std::vector<HopperTile> tiles_of(const Instance<Params> (&instances)[kCount]) {
  std::vector<HopperTile> tiles;
  for (const auto& instance : instances) tiles.push_back(instance.tile);
  return tiles;
}

// In bytes, of rows, heads and batches of 16-bit numbers.
std::array<uint64_t, 3> strides_of(const uint64_t (&sizes)[4], const Strides& strides) {
  const auto bytes = [](int64_t stride, uint64_t size) { return size > 1 ? uint64_t(2 * stride) : uint64_t{16}; };
  return {bytes(strides.row, sizes[1]), bytes(strides.head, sizes[2]), bytes(strides.batch, sizes[3])};
}

// A tensor [batch, head, length, head_dim] that the copy engine reads in boxes of `box_rows` rows and 64 columns.
cudaError_t describe(TensorMap* map, const HopperShape& shape, const HopperTensor& tensor, int length, int box_rows) {
  const uint64_t sizes[] = {uint64_t(shape.head_dim), uint64_t(length), uint64_t(shape.num_heads),
                            uint64_t(shape.batch_size)};
  const uint32_t box[] = {kPanelColumns, uint32_t(box_rows), 1, 1};
  return encode_tensor_map(map, tensor_map_type(shape.dtype), 4, tensor.data, sizes,
                           strides_of(sizes, tensor.strides).data(), box, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Sums as they lie in a gradient: [batch, head, Lq, D / 2] float32, in boxes of the 16 rows of a warp.
cudaError_t describe_sums(TensorMap* map, const HopperShape& shape, const HopperTensor& tensor) {
  const uint32_t columns = shape.head_dim / 2;
  const uint64_t sizes[] = {columns, uint64_t(shape.num_queries), uint64_t(shape.num_heads), uint64_t(shape.batch_size)};
  const uint32_t box[] = {columns, kSumsBoxRows, 1, 1};
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, tensor.data, sizes,
                           strides_of(sizes, tensor.strides).data(), box, CU_TENSOR_MAP_SWIZZLE_NONE);
}

HopperWork work_of(const HopperShape& shape) {
  return {shape.key_start,
          shape.key_end,
          shape.jobs,
          shape.next_item,
          shape.num_jobs,
          shape.num_jobs * shape.batch_size * shape.num_heads,
          shape.num_heads,
          shape.num_queries,
          shape.tail_heads,
          shape.scale};
}

bool is_empty(const HopperShape& shape) { return shape.batch_size * shape.num_heads * shape.num_jobs == 0; }

// Thread blocks of a launch: as many as are resident at a time, but no more than items.
cudaError_t count_blocks(const HopperTile& tile, const HopperWork& work, int* num_blocks) {
  int device, num_sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) *num_blocks = std::min(work.num_items, num_sms * tile.blocks_per_sm);
  return error;
}

template <class Params>
cudaError_t launch(const Instance<Params>& instance, const HopperShape& shape, Params& params, cudaStream_t stream,
                   int num_counters = 2, bool overlap = false) {
  int num_blocks;
  cudaError_t error = count_blocks(instance.tile, params.work, &num_blocks);
  const auto kernel = shape.dtype == DType::kBFloat16 ? instance.bfloat16 : instance.float16;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 instance.tile.shared_bytes);
  }
  if (error == cudaSuccess && shape.set_zero) {
    error = cudaMemsetAsync(params.work.next_item, 0, num_counters * sizeof(int32_t), stream);
  }
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, params, num_blocks, instance.num_threads, 1, instance.tile.shared_bytes, overlap, stream);
}

template <class Params, size_t kCount>
const Instance<Params>* find(const Instance<Params> (&instances)[kCount], int tile, const HopperShape& shape) {
  const bool known = tile >= 0 && tile < int(kCount) && instances[tile].tile.head_dim == shape.head_dim;
  return known ? &instances[tile] : nullptr;
}

}  // namespace

std::vector<HopperTile> hopper_forward_tiles() { return tiles_of(FORWARD); }
std::vector<HopperTile> hopper_dq_tiles() { return tiles_of(DQ); }
std::vector<HopperTile> hopper_dkdv_tiles() { return tiles_of(DKDV); }
std::vector<HopperTile> hopper_backward_tiles() { return tiles_of(BACKWARD); }

cudaError_t launch_hopper_forward(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                                  HopperTensor out, float* lse_log2, const float* head_bounds, float logit_bound,
                                  cudaStream_t stream) {
  const auto* instance = find(FORWARD, tile, shape);
  if (instance == nullptr) return cudaErrorInvalidValue;
  if (is_empty(shape)) return cudaSuccess;
  HopperForwardParams params{};
  cudaError_t error = describe(&params.q, shape, q, shape.num_queries, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.k, shape, k, shape.num_keys, instance->tile.block_cols);
  if (error == cudaSuccess) error = describe(&params.v, shape, v, shape.num_keys, instance->tile.block_cols);
  if (error != cudaSuccess) return error;
  params.out = const_cast<void*>(out.data), params.out_strides = out.strides;
  params.lse_log2 = lse_log2, params.head_bounds = head_bounds, params.logit_bound = logit_bound;
  params.work = work_of(shape);
  return launch(*instance, shape, params, stream);
}

cudaError_t launch_hopper_dq(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                             HopperTensor out, HopperTensor d_out, const float* lse_log2, const float* d_lse_log2, HopperTensor dq,
                             float* delta, bool overlap, cudaStream_t stream) {
  const auto* instance = find(DQ, tile, shape);
  if (instance == nullptr) return cudaErrorInvalidValue;
  if (is_empty(shape)) return cudaSuccess;
  HopperDqParams params{};
  cudaError_t error = describe(&params.q, shape, q, shape.num_queries, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.out, shape, out, shape.num_queries, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.d_out, shape, d_out, shape.num_queries, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.k, shape, k, shape.num_keys, instance->tile.block_cols);
  if (error == cudaSuccess) error = describe(&params.v, shape, v, shape.num_keys, instance->tile.block_cols);
  if (error != cudaSuccess) return error;
  params.lse_log2 = lse_log2, params.d_lse_log2 = d_lse_log2;
  params.dq = const_cast<void*>(dq.data), params.dq_strides = dq.strides;
  params.delta = delta;
  params.work = work_of(shape);
  return launch(*instance, shape, params, stream, 2, overlap);
}

cudaError_t launch_hopper_dkdv(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                               HopperTensor d_out, const float* lse_log2, const float* delta, HopperTensor dk, HopperTensor dv,
                               cudaStream_t stream) {
  const auto* instance = find(DKDV, tile, shape);
  if (instance == nullptr) return cudaErrorInvalidValue;
  if (is_empty(shape)) return cudaSuccess;
  HopperDkdvParams params{};
  cudaError_t error = describe(&params.k, shape, k, shape.num_keys, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.v, shape, v, shape.num_keys, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.q, shape, q, shape.num_queries, instance->tile.block_cols);
  if (error == cudaSuccess) error = describe(&params.d_out, shape, d_out, shape.num_queries, instance->tile.block_cols);
  if (error != cudaSuccess) return error;
  params.lse_log2 = lse_log2, params.delta = delta;
  params.dk = const_cast<void*>(dk.data), params.dk_strides = dk.strides;
  params.dv = const_cast<void*>(dv.data), params.dv_strides = dv.strides;
  params.work = work_of(shape);
  return launch(*instance, shape, params, stream);
}

cudaError_t launch_hopper_backward(int tile, const HopperShape& shape, HopperTensor q, HopperTensor k, HopperTensor v,
                                   HopperTensor out, HopperTensor d_out, const float* lse_log2, const float* d_lse_log2,
                                   HopperTensor dq, HopperTensor dk, HopperTensor dv, RowStatistics* statistics,
                                   int num_slots, int num_last_heads, cudaStream_t stream) {
  const auto* instance = find(BACKWARD, tile, shape);
  if (instance == nullptr) return cudaErrorInvalidValue;
  if (is_empty(shape)) return cudaSuccess;
  const int num_heads = shape.batch_size * shape.num_heads;
  if (num_slots < shape.tail_heads || num_slots > num_heads || shape.num_queries > shape.num_keys) return cudaErrorInvalidValue;
  if (num_last_heads > std::min(num_slots, shape.num_heads) || 3 * num_last_heads < num_slots) return cudaErrorInvalidValue;
  if (shape.tail_heads > 2 * num_last_heads) return cudaErrorInvalidValue;
  HopperBackwardParams params{};
  cudaError_t error = describe(&params.k, shape, k, shape.num_keys, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.v, shape, v, shape.num_keys, kGroupRows);
  if (error == cudaSuccess) error = describe(&params.q, shape, q, shape.num_queries, instance->tile.block_cols);
  if (error == cudaSuccess) error = describe(&params.d_out, shape, d_out, shape.num_queries, instance->tile.block_cols);
  if (error == cudaSuccess) error = describe_sums(&params.sums[IN_DQ], shape, dq);
  if (error == cudaSuccess) error = describe_sums(&params.sums[IN_DK], shape, dk);
  if (error == cudaSuccess) error = describe_sums(&params.sums[IN_DV], shape, dv);
  if (error != cudaSuccess) return error;
  params.out = out.data, params.out_strides = out.strides;
  params.d_out_rows = d_out.data, params.d_out_strides = d_out.strides;
  params.lse_log2 = lse_log2, params.d_lse_log2 = d_lse_log2;
  params.dq = const_cast<void*>(dq.data), params.dq_strides = dq.strides;
  params.dk = const_cast<void*>(dk.data), params.dk_strides = dk.strides;
  params.dv = const_cast<void*>(dv.data), params.dv_strides = dv.strides;
  params.statistics = statistics;
  params.next_chunk = shape.next_item + 1, params.next_first_chunk = shape.next_item + 2;
  params.progress = reinterpret_cast<HeadProgress*>(shape.next_item + kNumQueues);
  params.num_slots = num_slots;
  params.num_chunks = (shape.num_queries + kChunkQueries - 1) / kChunkQueries;
  params.num_batch_heads = num_heads;
  params.num_last_heads = num_last_heads;
  params.first_slot = (num_slots - (num_heads - num_last_heads) % num_slots) % num_slots;
  params.work = work_of(shape);
  int num_blocks;
  error = count_blocks(instance->tile, params.work, &num_blocks);
  if (error != cudaSuccess) return error;
  params.num_first_heads = std::min(num_slots, (num_blocks + shape.num_jobs - 1) / shape.num_jobs);
  return launch(*instance, shape, params, stream, kNumQueues + 2 * (num_heads + num_last_heads) + 2);
}

cudaError_t load_hopper() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(FORWARD[0].bfloat16));
}

}  // namespace hmar
