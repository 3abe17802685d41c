// Linear layers of few rows for sm_90a, as generation has them at most scales of an image: the time goes into reading the weight.
//
//   y = gelu(x W^T + b)   or   y = residual + gate (x W^T + b);    and before it   h = LN(x) (1 + scale) + shift
//
// Features are the rows of wgmma, and rows of x its columns. A block has 64 features, or 128 so that x is not read more often
// than the weight; K is divided among the blocks of a cluster. Two warps fetch. One brings the weight, whole lines of 128 bytes,
// as far ahead as its ring goes, and never waits for the kernel before (programmatic dependent launch): weights must not be
// written by any kernel under way. The other brings x once that kernel has ended. Each block leaves its sums in its shared
// memory; then every block of the cluster adds up some rows, in the order of the blocks, so that results are bit-equal from run
// to run.
//
// NOTE: the next kernel may start when the last weights have been asked for. Earlier its ring would be full too soon, and memory
// idle from the end of this one until the next one's x is there.
// Read next: linear_rows.h.
#pragma once

#include "hopper_tile.cuh"

namespace hmar {

constexpr int kRingBytes = 104 * 1024;  // of two blocks an SM, this kernel's and the next one's
constexpr int kFetchThreads = 64;
constexpr int kNormWarps = 8, kNormThreads = 32 * kNormWarps;
constexpr int kNormVectors = 8;         // of four numbers a thread: rows of at most 8192

// kRows: of x, a multiple of 8.
template <DType kType_, int kRows_>
struct LinearRowsTile {
  static constexpr DType kType = kType_;
  static constexpr int kRows = kRows_;
  static constexpr int kGroups = kRows > 32 ? 2 : 1;
  static constexpr int kFeatures = kGroups * kGroupRows;
  static constexpr int kComputeThreads = kGroups * kGroupThreads, kNumThreads = kComputeThreads + kFetchThreads;

  static constexpr int kWeightBytes = kFeatures * kPanelRowBytes, kXBytes = kRows * kPanelRowBytes;
  static constexpr int kXStages = kRows <= 16 ? 8 : kRows <= 64 ? 4 : 3;
  static constexpr int kStages = (kRingBytes - kXStages * kXBytes) / kWeightBytes;

  static constexpr int kRowStep = kComputeThreads / kFeatures;  // rows that a block writes at once
  static constexpr int kAtOnce = kGroups == 1 ? 4 : 2;          // outputs of a thread whose parts are read together
  static constexpr int kSumsRow = kFeatures + 4;  // so that the lanes of a warp write to 32 banks

  struct Shared {
    alignas(1024) uint8_t weight[kStages][kWeightBytes];
    alignas(1024) uint8_t x[kXStages][kXBytes];
    Barrier weight_full[kStages], weight_empty[kStages];
    Barrier x_full[kXStages], x_empty[kXStages];

    // [kRows, kSumsRow], in the place of the rings.
    __device__ __forceinline__ float* sums() { return reinterpret_cast<float*>(weight); }
  };
  static_assert(kLinearInputs == kPanelColumns);
  static_assert(4 * kRows * kSumsRow <= kStages * kWeightBytes + kXStages * kXBytes);
};

// What a block of a cluster has of the sum over K.
struct ChunkRange {
  int begin, end;

  __device__ __forceinline__ ChunkRange(const LinearRowsParams& params, int rank, int splits)
      : begin(params.num_chunks * rank / splits), end(params.num_chunks * (rank + 1) / splits) {}
};

template <DType kType>
__device__ __forceinline__ float value_of(uint16_t number) {
  float value, nothing;
  unpack<kType>(number, value, nothing);
  return value;
}

// One thread.
template <class Tile>
__device__ __forceinline__ void fetch_weights(const LinearRowsParams& params, typename Tile::Shared& shared,
                                              ChunkRange chunks, int first_feature) {
  RingPosition<Tile::kStages> ring;
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    barrier_wait(shared.weight_empty[ring.stage], ring.parity ^ 1);
    barrier_arrive_expecting(shared.weight_full[ring.stage], Tile::kWeightBytes);
    tma_load(shared.weight[ring.stage], params.weight, shared.weight_full[ring.stage], chunk * kLinearInputs,
             first_feature);
    ring.advance();
  }
  launch_dependents();
}

// One thread.
template <class Tile>
__device__ __forceinline__ void fetch_x(const LinearRowsParams& params, typename Tile::Shared& shared, ChunkRange chunks) {
  RingPosition<Tile::kXStages> ring;
  prefetch_map(params.x);
  wait_for_previous();
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    barrier_wait(shared.x_empty[ring.stage], ring.parity ^ 1);
    barrier_arrive_expecting(shared.x_full[ring.stage], Tile::kXBytes);
    tma_load(shared.x[ring.stage], params.x, shared.x_full[ring.stage], chunk * kLinearInputs, 0);
    ring.advance();
  }
}

// Sums of 64 features over some chunks, by a warpgroup. The buffers are not given back for the last chunk.
template <class Tile>
__device__ __forceinline__ void multiply_rows(typename Tile::Shared& shared, ChunkRange chunks, int group,
                                              float (&d)[Tile::kRows / 2]) {
  RingPosition<Tile::kStages> weights;
  RingPosition<Tile::kXStages> rows;
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    barrier_wait(shared.weight_full[weights.stage], weights.parity);
    barrier_wait(shared.x_full[rows.stage], rows.parity);
    const uint64_t a = row_descriptor(shared.weight[weights.stage] + group * kGroupRows * kPanelRowBytes);
    const uint64_t b = row_descriptor(shared.x[rows.stage]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kLinearInputs / 16; ++k) {
      wgmma<Tile::kType, false>(d, advanced(a, k * 32), advanced(b, k * 32), chunk > chunks.begin || k > 0);
    }
    wgmma_commit();
    // The products of the chunk before are done: its buffers are free.
    wgmma_wait<1>();
    if (chunk > chunks.begin) {
      release(shared.weight_empty[weights.last_stage()]);
      release(shared.x_empty[rows.last_stage()]);
    }
    weights.advance();
    rows.advance();
  }
  wgmma_wait<0>();
}

template <class Tile>
__device__ __forceinline__ void store_sums(typename Tile::Shared& shared, int group, const float (&d)[Tile::kRows / 2]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* sums = shared.sums() + 2 * t * Tile::kSumsRow + group * kGroupRows + 16 * warp + g;
#pragma unroll
  for (int n = 0; n < Tile::kRows / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(8 * n + i % 2) * Tile::kSumsRow + i / 2 * 8] = d[4 * n + i];
  }
}

// What surrounds outputs of a thread: kAtOnce of its feature, from a row on.
// NOTE: as it is read, without branches, and rows beyond the last one like that: so that nothing waits for the loads before the
// outputs do.
template <class Tile>
struct Surroundings {
  float wide[Tile::kAtOnce];  // the residual, in one of these two
  uint16_t narrow[Tile::kAtOnce];
  uint16_t gate[Tile::kAtOnce];

  __device__ __forceinline__ void load(const LinearRowsParams& params, int first_row, int row_step, int feature) {
    if (params.residual == nullptr) return;
#pragma unroll
    for (int i = 0; i < Tile::kAtOnce; ++i) {
      const int row = first_row + i * row_step < params.num_rows ? first_row + i * row_step : params.num_rows - 1;
      const int64_t at = int64_t{row} * params.num_outputs + feature;
      if (params.float_residual) wide[i] = static_cast<const float*>(params.residual)[at];
      if (!params.float_residual) narrow[i] = static_cast<const uint16_t*>(params.residual)[at];
      gate[i] = static_cast<const uint16_t*>(params.gate)[row / params.image_rows * params.gate_stride + feature];
    }
  }

  // residual + gate y
  __device__ __forceinline__ float around(const LinearRowsParams& params, int i, float y) const {
    if (params.residual == nullptr) return y;
    return (params.float_residual ? wide[i] : value_of<Tile::kType>(narrow[i])) + value_of<Tile::kType>(gate[i]) * y;
  }
};

template <class Tile>
__device__ __forceinline__ void store_output(const LinearRowsParams& params, int row, int feature, float y) {
  const int64_t at = int64_t{row} * params.num_outputs + feature;
  if (params.residual != nullptr && params.float_residual) {
    static_cast<float*>(params.y)[at] = y;
  } else {
    static_cast<uint16_t*>(params.y)[at] = static_cast<uint16_t>(pack<Tile::kType>(y, 0.0f));
  }
}

// Adds up what the blocks of the cluster have of one feature, and writes its outputs from this thread's first row on. sums: of
// the feature. surroundings: of the first rows.
template <class Tile>
__device__ __forceinline__ void store_outputs(const LinearRowsParams& params, const float* sums, Surroundings<Tile>& surroundings,
                                              int first_row, int row_step, int feature, float bias, int splits) {
  // NOTE: a block alone reads its shared memory as its own, which takes no way through the cluster's network.
  const int others = splits == 1 ? 0 : splits;
#pragma unroll 1
  for (int begin = first_row; begin < params.num_rows; begin += Tile::kAtOnce * row_step) {
    if (begin != first_row) surroundings.load(params, begin, row_step, feature);
    float parts[Tile::kAtOnce][kMaxLinearSplits], only[Tile::kAtOnce];
#pragma unroll
    for (int i = 0; i < Tile::kAtOnce; ++i) {
      const int row = begin + i * row_step;
      const bool valid = row < params.num_rows;
#pragma unroll
      for (int from = 0; from < kMaxLinearSplits; ++from) {
        parts[i][from] = valid && from < others ? load_cluster(sums + row * Tile::kSumsRow, from) : 0.0f;
      }
      only[i] = valid && others == 0 ? sums[row * Tile::kSumsRow] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Tile::kAtOnce; ++i) {
      const int row = begin + i * row_step;
      float y = bias + only[i];
#pragma unroll
      for (int from = 0; from < kMaxLinearSplits; ++from) y += parts[i][from];
      // 0.5 (1 + tanh u) = 1 / (1 + 2^(-2 u log2 e)), and 2 sqrt(2 / pi) log2 e = 2.3022082
      if (params.gelu) y /= 1.0f + exp2_approx(-2.3022082f * (y + 0.044715f * y * y * y));
      y = surroundings.around(params, i, y);
      if (row < params.num_rows) store_output<Tile>(params, row, feature, y);
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, 2) linear_rows_kernel(const __grid_constant__ LinearRowsParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  const int rank = cluster_rank(), splits = cluster_size();
  const int first_feature = blockIdx.x / splits * Tile::kFeatures;
  const ChunkRange chunks(params, rank, splits);
  if (threadIdx.x == Tile::kComputeThreads) {
    constexpr int kWarps = 4 * Tile::kGroups;
    barriers_init(shared.weight_full, 1), barriers_init(shared.weight_empty, kWarps);
    barriers_init(shared.x_full, 1), barriers_init(shared.x_empty, kWarps);
    fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= Tile::kComputeThreads) {
    if (threadIdx.x == Tile::kComputeThreads) fetch_weights<Tile>(params, shared, chunks, first_feature);
    if (threadIdx.x == Tile::kComputeThreads + 32) fetch_x<Tile>(params, shared, chunks);
    cluster_sync();
  } else {
    const int group = uniform(threadIdx.x / kGroupThreads), column = threadIdx.x % Tile::kFeatures;
    const int feature = first_feature + column;
    const int first_row = rank + splits * (threadIdx.x / Tile::kFeatures), row_step = splits * Tile::kRowStep;
    const bool valid = feature < params.num_outputs;
    const float bias = valid && params.bias != nullptr
                           ? value_of<Tile::kType>(static_cast<const uint16_t*>(params.bias)[feature])
                           : 0.0f;
    float d[Tile::kRows / 2];
    multiply_rows<Tile>(shared, chunks, group, d);
    wait_for_previous();
    Surroundings<Tile> surroundings;
    if (valid) surroundings.load(params, first_row, row_step, feature);
    group_sync<Tile::kComputeThreads>(0);
    store_sums<Tile>(shared, group, d);
    cluster_sync();
    if (valid) {
      store_outputs<Tile>(params, shared.sums() + column, surroundings, first_row, row_step, feature, bias, splits);
    }
  }
  // NOTE: a block's shared memory is read by others until here.
  cluster_leave();
}

// Of all threads of a block, the same for each of them.
__device__ __forceinline__ float block_sum(float value, float* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kNormWarps; ++warp) total += shared[warp];
  return total;
}

template <DType kType>
__device__ __forceinline__ void unpack_vector(uint2 numbers, float (&values)[4]) {
  unpack<kType>(numbers.x, values[0], values[1]);
  unpack<kType>(numbers.y, values[2], values[3]);
}

// One row of h a block.
template <DType kType>
__global__ void __launch_bounds__(kNormThreads) norm_rows_kernel(const __grid_constant__ NormRowsParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto* shared = reinterpret_cast<float*>(shared_memory);
  launch_dependents();
  wait_for_previous();
  const int row = blockIdx.x, num_vectors = params.num_inputs / 4;
  const int64_t begin = static_cast<int64_t>(row) * params.num_inputs;
  float x[kNormVectors][4];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    const int vector = i * kNormThreads + threadIdx.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i][j] = 0.0f;
    if (vector >= num_vectors) continue;
    if (params.float_x) {
      const auto numbers = reinterpret_cast<const float4*>(static_cast<const float*>(params.x) + begin)[vector];
      x[i][0] = numbers.x, x[i][1] = numbers.y, x[i][2] = numbers.z, x[i][3] = numbers.w;
    } else {
      unpack_vector<kType>(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(params.x) + begin)[vector], x[i]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += x[i][j];
  }
  const float mean = block_sum(sum, shared) / params.num_inputs;
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    if (i * kNormThreads + threadIdx.x >= num_vectors) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) squares += (x[i][j] - mean) * (x[i][j] - mean);
  }
  const float rstd = inverse_root(block_sum(squares, shared + kNormWarps) / params.num_inputs + params.eps);
  const int image = row / params.image_rows;
  const auto* scale = static_cast<const uint16_t*>(params.scale) + image * params.scale_stride;
  const auto* shift = static_cast<const uint16_t*>(params.shift) + image * params.shift_stride;
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    const int vector = i * kNormThreads + threadIdx.x;
    if (vector >= num_vectors) continue;
    float factor[4], offset[4], h[4];
    unpack_vector<kType>(reinterpret_cast<const uint2*>(scale)[vector], factor);
    unpack_vector<kType>(reinterpret_cast<const uint2*>(shift)[vector], offset);
#pragma unroll
    for (int j = 0; j < 4; ++j) h[j] = (x[i][j] - mean) * rstd * (1.0f + factor[j]) + offset[j];
    reinterpret_cast<uint2*>(static_cast<uint16_t*>(params.h) + begin)[vector] =
        uint2{pack<kType>(h[0], h[1]), pack<kType>(h[2], h[3])};
  }
}

}  // namespace hmar
