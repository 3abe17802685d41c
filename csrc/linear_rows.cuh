// Linear layers of few rows for sm_90a, as generation has them at most scales of an image: the time goes into reading the
// weight.
//
//   y = gelu(h W^T + b)   or   y = residual + gate (h W^T + b);    h = x   or   h = LN(x) (1 + scale) + shift
//
// Features are the rows of wgmma, and rows of x its columns. A block has 64 features; K is divided among the blocks of a
// cluster. One warp brings the weight, whole lines of 128 bytes, as far ahead as its ring goes, and never waits for the kernel
// before (programmatic dependent launch): weights must not be written by any kernel under way. Another one brings x once that
// kernel has ended; where there is a norm, eight warps do, and write what the copy engine would have brought of h. Each block
// leaves its sums in its shared memory; then every block of the cluster adds up some rows, in the order of the blocks, so that
// results are bit-equal from run to run.
//
// The mean and variance of a row of x come from those of its tiles of 64 numbers, as the kernel that wrote x left them: a block
// has all of a tile of y. Of other x, and of more than a few rows, which every block would read and norm again, the norm is a
// kernel of its own.
//
// NOTE: the next kernel may start when the last weights have been asked for. Earlier its ring would be full too soon, and
// memory idle from the end of this one until the next one's x is there.
// Read next: rows.cuh, linear_rows.h.
#pragma once

#include "rows.cuh"

namespace hmar {

constexpr int kRingBytes = 104 * 1024;  // of two blocks an SM, this kernel's and the next one's
constexpr int kPieces = 3;              // of a row, eight numbers each, that a thread of these warps has under way
constexpr int kTilesAtOnce = 3;         // of a row, whose statistics a thread reads together
constexpr int kNormVectors = 8;         // of four numbers a thread of the norm's own kernel: rows of at most 8192

constexpr int kMomentsBarrier = 2;

// kRows: of x, a multiple of 8. kNormed: of a norm of x.
template <DType kType_, int kRows_, bool kNormed_>
struct LinearRowsTile {
  static constexpr DType kType = kType_;
  static constexpr int kRows = kRows_;
  static constexpr bool kNormed = kNormed_;
  static constexpr int kFirstNormThread = kGroupThreads + 32;
  static constexpr int kNumThreads = kFirstNormThread + (kNormed ? kNormThreads : 32);

  static constexpr int kWeightBytes = kLinearFeatures * kPanelRowBytes, kXBytes = kRows * kPanelRowBytes;
  static constexpr int kXStages = kRows <= 16 ? 8 : 4;
  static constexpr int kStages = (kRingBytes - kXStages * kXBytes) / kWeightBytes;

  static constexpr int kRowsAtOnce = kNormed ? 1 : 2;  // of which a warp reads the parts together

  struct Shared {
    alignas(1024) uint8_t weight[kStages][kWeightBytes];
    alignas(1024) uint8_t x[kXStages][kXBytes];
    Barrier weight_full[kStages], weight_empty[kStages];
    Barrier x_full[kXStages], x_empty[kXStages];
    RowMoments moments[kNormed ? kRows : 1];

    // [kRows, kSumsRow], in the place of the rings.
    __device__ __forceinline__ float* sums() { return reinterpret_cast<float*>(weight); }
  };
  static_assert(!kNormed || kRows <= 4 * kNormWarps);
  static_assert(4 * kRows * kSumsRow <= kStages * kWeightBytes + kXStages * kXBytes);
};

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
  prefetch_map(params.x_map);
  wait_for_previous();
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    barrier_wait(shared.x_empty[ring.stage], ring.parity ^ 1);
    barrier_arrive_expecting(shared.x_full[ring.stage], Tile::kXBytes);
    tma_load(shared.x[ring.stage], params.x_map, shared.x_full[ring.stage], chunk * kLinearInputs, 0);
    ring.advance();
  }
}

// Of all rows, by the warpgroup that computes, while others wait for x.
template <class Tile>
__device__ __forceinline__ void find_moments(const LinearRowsParams& params, typename Tile::Shared& shared) {
  constexpr int kLanes = kGroupThreads / Tile::kRows;
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const TileStatistics* tiles = params.norm.statistics + int64_t{min(row, params.out.num_rows - 1)} * params.num_chunks;
  wait_for_previous();
  const RowMoments moments = moments_of_tiles<kLanes, kTilesAtOnce>(tiles, params.num_inputs, lane, params.norm.eps);
  if (lane == 0) shared.moments[row] = moments;
}

// kNormWarps warps.
template <class Tile>
__device__ __forceinline__ void norm_x(const LinearRowsParams& params, typename Tile::Shared& shared, ChunkRange chunks) {
  const PlaceInChunk<Tile> at(params.out.num_rows);
  const int first = chunks.begin + at.chunk, num_images = (params.out.num_rows - 1) / params.out.image_rows + 1;
  const auto *scale = static_cast<const uint16_t*>(params.norm.scale), *shift = static_cast<const uint16_t*>(params.norm.shift);
  // NOTE: vectors of an image are written long before they are read, and weights have taken their place in the L2 cache.
  for (int image = 0; image < num_images; ++image) {
    const int thread = threadIdx.x - Tile::kFirstNormThread;
    for (int column = (chunks.begin + thread) * kLinearInputs;
         column < chunks.end * kLinearInputs && column < params.num_inputs; column += kNormThreads * kLinearInputs) {
      prefetch_l2(scale + image * params.norm.scale_stride + column);
      prefetch_l2(shift + image * params.norm.shift_stride + column);
    }
  }
  const int image = at.row / params.out.image_rows;
  const auto* x = static_cast<const uint8_t*>(params.x) + at.row * params.num_inputs * int64_t{params.float_x ? 4 : 2};
  NormedRow<Tile::kType> row{x, scale + image * params.norm.scale_stride, shift + image * params.norm.shift_stride,
                             params.num_inputs, params.float_x};
  const auto load = [&](RowPiece& piece, int chunk) {
    row.load_x(piece, chunk * kLinearInputs + at.column);
    row.load_vectors(piece, chunk * kLinearInputs + at.column);
  };
  wait_for_previous();
  RowPiece pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (first + i * at.step < chunks.end) load(pieces[i], first + i * at.step);
  }
  named_barrier_sync(kMomentsBarrier, kGroupThreads + kNormThreads);
  row.moments = shared.moments[at.row];
#pragma unroll 1
  for (int begin = first; begin < chunks.end; begin += kPieces * at.step) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = begin + i * at.step, later = chunk + kPieces * at.step, turn = chunk - chunks.begin;
      if (chunk >= chunks.end) break;
      const uint4 h = row.normed(pieces[i]);
      if (later < chunks.end) load(pieces[i], later);
      const int stage = turn % Tile::kXStages;
      barrier_wait(shared.x_empty[stage], turn / Tile::kXStages % 2 ^ 1);
      *reinterpret_cast<uint4*>(shared.x[stage] + at.bytes()) = h;
      release(shared.x_full[stage]);
    }
  }
}

// Sums of 64 features over some chunks, by a warpgroup. The buffers are not given back for the last chunk.
template <class Tile>
__device__ __forceinline__ void multiply_rows(typename Tile::Shared& shared, ChunkRange chunks, float (&d)[Tile::kRows / 2]) {
  RingPosition<Tile::kStages> weights;
  RingPosition<Tile::kXStages> rows;
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    barrier_wait(shared.weight_full[weights.stage], weights.parity);
    barrier_wait(shared.x_full[rows.stage], rows.parity);
    // NOTE: here, and not where x is written: there the fence may wait for what has been asked for of later chunks.
    if constexpr (Tile::kNormed) fence_async_proxy();
    const uint64_t a = row_descriptor(shared.weight[weights.stage]);
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
__global__ void __launch_bounds__(Tile::kNumThreads, 2) linear_rows_kernel(const __grid_constant__ LinearRowsParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  const int rank = cluster_rank(), splits = cluster_size();
  const int first_feature = blockIdx.x / splits * kLinearFeatures;
  const ChunkRange chunks(params.num_chunks, rank, splits);
  if (threadIdx.x == kGroupThreads) {
    barriers_init(shared.weight_full, 1), barriers_init(shared.weight_empty, kGroupThreads / 32);
    barriers_init(shared.x_full, Tile::kNormed ? warps_of_chunk<Tile>(params.out.num_rows) : 1);
    barriers_init(shared.x_empty, kGroupThreads / 32);
    fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= kGroupThreads) {
    if (threadIdx.x == kGroupThreads) fetch_weights<Tile>(params, shared, chunks, first_feature);
    if constexpr (Tile::kNormed) {
      if (threadIdx.x >= Tile::kFirstNormThread) norm_x<Tile>(params, shared, chunks);
    } else {
      if (threadIdx.x == Tile::kFirstNormThread) fetch_x<Tile>(params, shared, chunks);
    }
    cluster_sync();
  } else {
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, feature = first_feature + lane;
    const int first_row = rank + splits * warp, row_step = splits * (kGroupThreads / 32);
    float bias[2];
    load_bias<Tile::kType>(bias, params.out, feature);
    if constexpr (Tile::kNormed) {
      find_moments<Tile>(params, shared);
      named_barrier_arrive(kMomentsBarrier, kGroupThreads + kNormThreads);
    }
    float d[Tile::kRows / 2];
    multiply_rows<Tile>(shared, chunks, d);
    wait_for_previous();
    Surroundings<Tile> surroundings;
    surroundings.load_gates(params.out, first_row, row_step, feature);
    surroundings.load_residual(params.out, first_row, row_step, feature);
    group_sync(0);
    float* sums = shared.sums();
    visit_sums<Tile::kRows>(d, [&](int row, int feature, float sum) { sums[row * kSumsRow + feature] = sum; });
    cluster_sync();
    // NOTE: a block alone reads its shared memory as its own, which takes no way through the cluster's network.
    const auto part = [&](int row, int feature, int from) {
      const float* sum = sums + row * kSumsRow + feature;
      if (splits == 1) return from == 0 ? *sum : 0.0f;
      return from < splits ? load_cluster(sum, from) : 0.0f;
    };
    store_outputs<Tile, kMaxLinearSplits>(params.out, part, surroundings, first_row, row_step, feature, bias);
  }
  // NOTE: a block's shared memory is read by others until here.
  cluster_leave();
}

// Of all threads of a block, the same for each of them.
__device__ __forceinline__ float block_sum(float value, float* shared) {
  value = sum_of_lanes<32>(value);
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
