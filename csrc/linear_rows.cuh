// Linear layers of few rows for sm_90a, as generation has them at most scales of an image: the time goes into reading the weight.
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
// has all of a tile of y. Of other x they are found by a kernel of their own.
//
// NOTE: the next kernel may start when the last weights have been asked for. Earlier its ring would be full too soon, and memory
// idle from the end of this one until the next one's x is there.
// Read next: linear_rows.h.
#pragma once

#include "hopper_tile.cuh"

namespace hmar {

constexpr int kRingBytes = 104 * 1024;  // of two blocks an SM, this kernel's and the next one's
constexpr int kNormWarps = 8;
constexpr int kPieces = 3;              // of a row, eight numbers each, that a thread of these warps has under way
constexpr int kTilesAtOnce = 9;         // of a row, whose statistics a thread reads together: all of up to 2304 numbers
constexpr int kStatisticsWarps = 8;

constexpr int kMomentsBarrier = 2;

// What a norm takes of a row.
struct alignas(8) RowMoments {
  float mean, rstd;
};

// kRows: of x, a multiple of 8. kNormed: of a norm of x.
template <DType kType_, int kRows_, bool kNormed_>
struct LinearRowsTile {
  static constexpr DType kType = kType_;
  static constexpr int kRows = kRows_;
  static constexpr bool kNormed = kNormed_;
  static constexpr int kNumThreads = kGroupThreads + 32 + 32 * (kNormed ? kNormWarps : 1);

  static constexpr int kWeightBytes = kLinearFeatures * kPanelRowBytes, kXBytes = kRows * kPanelRowBytes;
  static constexpr int kXStages = kRows <= 16 ? 8 : 4;
  static constexpr int kStages = (kRingBytes - kXStages * kXBytes) / kWeightBytes;

  static constexpr int kRowsAtOnce = 2;                 // of which a warp reads the parts together
  static constexpr int kSumsRow = kLinearFeatures + 4;  // so that the lanes of a warp write to 32 banks

  struct Shared {
    alignas(1024) uint8_t weight[kStages][kWeightBytes];
    alignas(1024) uint8_t x[kXStages][kXBytes];
    Barrier weight_full[kStages], weight_empty[kStages];
    Barrier x_full[kXStages], x_empty[kXStages];
    RowMoments moments[kRows];

    // [kRows, kSumsRow], in the place of the rings.
    __device__ __forceinline__ float* sums() { return reinterpret_cast<float*>(weight); }
  };
  static_assert(kLinearInputs == kPanelColumns && kLinearFeatures == kGroupRows && (!kNormed || kRows <= 4 * kNormWarps));
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

// Among lanes whose numbers differ in the bits below kLanes.
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// How many numbers of a row a tile has; 0 or less beyond the last one.
__device__ __forceinline__ int tile_size(int num_columns, int tile) {
  return min(kLinearFeatures, num_columns - tile * kLinearFeatures);
}

// Of a tile that a warp has, numbers lane and lane + 32 of it in a lane, of which `size` count.
__device__ __forceinline__ TileStatistics tile_statistics(const float (&x)[2], int size) {
  const int lane = threadIdx.x % 32;
  const bool first = lane < size, second = lane + 32 < size;
  const float mean = sum_of_lanes<32>((first ? x[0] : 0.0f) + (second ? x[1] : 0.0f)) / size;
  const float distances[] = {first ? x[0] - mean : 0.0f, second ? x[1] - mean : 0.0f};
  return {mean, sum_of_lanes<32>(distances[0] * distances[0] + distances[1] * distances[1])};
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

// How many warps bring a chunk of normed x, four rows each; the others have the chunks that follow.
// NOTE: not more chunks at a time than the ring has, of which no warp must pass over a turn.
template <class Tile>
__device__ __forceinline__ int warps_of_chunk(int num_rows) {
  int warps = kNormWarps / Tile::kXStages;
  while (4 * warps < num_rows) warps *= 2;
  return warps;
}

// Of all rows, by the warpgroup that computes, while others wait for x.
// NOTE: sums of distances from the first tile's mean, not of the numbers, so that nothing is lost where means are large.
template <class Tile>
__device__ __forceinline__ void find_moments(const LinearRowsParams& params, typename Tile::Shared& shared) {
  constexpr int kLanes = kGroupThreads / Tile::kRows;
  const int row = threadIdx.x / kLanes, num_tiles = params.num_chunks, num_columns = params.num_inputs;
  const TileStatistics* tiles = params.norm.statistics + int64_t{min(row, params.num_rows - 1)} * num_tiles;
  wait_for_previous();
  const float origin = tiles[0].mean;
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int begin = 0; begin < num_tiles; begin += kTilesAtOnce * kLanes) {
    const int first = begin + threadIdx.x % kLanes;
    TileStatistics parts[kTilesAtOnce];
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) parts[i] = tiles[min(first + i * kLanes, num_tiles - 1)];
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int size = tile_size(num_columns, first + i * kLanes);
      const float distance = parts[i].mean - origin;
      if (size > 0) sum += size * distance, squares += parts[i].squares + size * distance * distance;
    }
  }
  const float distance = sum_of_lanes<kLanes>(sum) / num_columns;
  const float variance = fmaxf(sum_of_lanes<kLanes>(squares) / num_columns - distance * distance, 0.0f);
  if (threadIdx.x % kLanes == 0) shared.moments[row] = {origin + distance, inverse_root(variance + params.norm.eps)};
}

// Eight numbers of a row as they are read. x: where it is not float32, the first half.
struct RowPiece {
  uint4 x[2], scale, shift;
};

// What eight lanes bring of one row of h.
template <class Tile>
struct NormedRow {
  int row, image;
  RowMoments moments;

  // Beyond K it is the last piece once more, for which weights are zero.
  __device__ __forceinline__ void load(const LinearRowsParams& params, RowPiece& piece, int column) const {
    column = min(column, params.num_inputs - 8);
    const int at = row * params.num_inputs + column;
    const auto* bytes = static_cast<const uint8_t*>(params.x) + at * int64_t{params.float_x ? 4 : 2};
    const auto* x = reinterpret_cast<const uint4*>(bytes);
    piece.x[0] = x[0];
    if (params.float_x) piece.x[1] = x[1];
    const auto* scale = static_cast<const uint16_t*>(params.norm.scale) + image * params.norm.scale_stride + column;
    const auto* shift = static_cast<const uint16_t*>(params.norm.shift) + image * params.norm.shift_stride + column;
    piece.scale = *reinterpret_cast<const uint4*>(scale), piece.shift = *reinterpret_cast<const uint4*>(shift);
  }

  __device__ __forceinline__ uint4 normed(const LinearRowsParams& params, const RowPiece& piece) const {
    const uint32_t x[] = {piece.x[0].x, piece.x[0].y, piece.x[0].z, piece.x[0].w,
                          piece.x[1].x, piece.x[1].y, piece.x[1].z, piece.x[1].w};
    const uint32_t scale[] = {piece.scale.x, piece.scale.y, piece.scale.z, piece.scale.w};
    const uint32_t shift[] = {piece.shift.x, piece.shift.y, piece.shift.z, piece.shift.w};
    uint32_t h[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float numbers[2] = {__uint_as_float(x[2 * i]), __uint_as_float(x[2 * i + 1])}, factor[2], offset[2];
      if (!params.float_x) unpack<Tile::kType>(x[i], numbers[0], numbers[1]);
      unpack<Tile::kType>(scale[i], factor[0], factor[1]);
      unpack<Tile::kType>(shift[i], offset[0], offset[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        numbers[j] = (numbers[j] - moments.mean) * moments.rstd * (1.0f + factor[j]) + offset[j];
      }
      h[i] = pack<Tile::kType>(numbers[0], numbers[1]);
    }
    return {h[0], h[1], h[2], h[3]};
  }
};

// kNormWarps warps. Lanes of rows beyond the last one do what those of the last one do.
template <class Tile>
__device__ __forceinline__ void norm_x(const LinearRowsParams& params, typename Tile::Shared& shared, ChunkRange chunks) {
  const int thread = threadIdx.x - kGroupThreads - 32, warp = uniform(thread / 32), lane = thread % 32;
  const int chunk_warps = warps_of_chunk<Tile>(params.num_rows), step = kNormWarps / chunk_warps;
  const int place = warp % chunk_warps * 4 + lane / 8, row = min(place, params.num_rows - 1), column = lane % 8 * 8;
  const int first = chunks.begin + warp / chunk_warps;
  const int num_images = (params.num_rows - 1) / params.image_rows + 1;
  NormedRow<Tile> normed{row, row / params.image_rows};
  // NOTE: vectors of an image are written long before they are read, and weights have taken their place in the L2 cache.
  for (int image = 0; image < num_images; ++image) {
    for (int at = (chunks.begin + thread) * kLinearInputs; at < chunks.end * kLinearInputs && at < params.num_inputs;
         at += 32 * kNormWarps * kLinearInputs) {
      prefetch_l2(static_cast<const uint16_t*>(params.norm.scale) + image * params.norm.scale_stride + at);
      prefetch_l2(static_cast<const uint16_t*>(params.norm.shift) + image * params.norm.shift_stride + at);
    }
  }
  wait_for_previous();
  RowPiece pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (first + i * step < chunks.end) normed.load(params, pieces[i], (first + i * step) * kLinearInputs + column);
  }
  named_barrier_sync(kMomentsBarrier, kGroupThreads + 32 * kNormWarps);
  normed.moments = shared.moments[row];
#pragma unroll 1
  for (int begin = first; begin < chunks.end; begin += kPieces * step) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = begin + i * step, later = chunk + kPieces * step, turn = chunk - chunks.begin;
      if (chunk >= chunks.end) break;
      const uint4 h = normed.normed(params, pieces[i]);
      if (later < chunks.end) normed.load(params, pieces[i], later * kLinearInputs + column);
      const int stage = turn % Tile::kXStages;
      barrier_wait(shared.x_empty[stage], turn / Tile::kXStages % 2 ^ 1);
      *reinterpret_cast<uint4*>(shared.x[stage] + place * kPanelRowBytes + (column / 8 ^ place % 8) * 16) = h;
      release(shared.x_full[stage]);
    }
  }
}

__device__ __forceinline__ void pace(int cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {}
}
__device__ __forceinline__ void read_ahead(const LinearRowsParams& params) {
  const int lane = threadIdx.x % 32, mode = params.next_mode;
  if (mode == 1 && lane == 0) {
#pragma unroll 1
    for (int64_t at = int64_t{blockIdx.x} * params.next_step; at < params.next_bytes; at += int64_t{gridDim.x} * params.next_step) {
      prefetch_bulk(params.next + at, params.next_step);
      if (params.next_pace > 0) pace(params.next_pace);
    }
  }
  if (mode == 2) {
#pragma unroll 1
    for (int64_t at = int64_t{blockIdx.x} * 4096 + lane * 128; at < params.next_bytes; at += int64_t{gridDim.x} * 4096) {
      prefetch_l2(params.next + at);
      if (params.next_pace > 0) pace(params.next_pace);
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
__device__ __forceinline__ void store_sums(typename Tile::Shared& shared, const float (&d)[Tile::kRows / 2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* sums = shared.sums() + 2 * t * Tile::kSumsRow + 16 * warp + g;
#pragma unroll
  for (int n = 0; n < Tile::kRows / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(8 * n + i % 2) * Tile::kSumsRow + i / 2 * 8] = d[4 * n + i];
  }
}

// What surrounds outputs of a thread: two features, 32 apart, of kRowsAtOnce rows from one on.
// NOTE: as it is read, without branches, and what lies beyond the last row or feature like that: so that nothing waits for the
// loads before the outputs do.
template <class Tile>
struct Surroundings {
  float wide[Tile::kRowsAtOnce][2];  // the residual, in one of these two
  uint16_t narrow[Tile::kRowsAtOnce][2];
  uint16_t gate[Tile::kRowsAtOnce][2];

  __device__ __forceinline__ void load(const LinearRowsParams& params, int first_row, int row_step, int first_feature) {
    if (params.residual == nullptr) return;
#pragma unroll
    for (int i = 0; i < Tile::kRowsAtOnce; ++i) {
      const int row = min(first_row + i * row_step, params.num_rows - 1);
      const auto* gates = static_cast<const uint16_t*>(params.gate) + row / params.image_rows * params.gate_stride;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int feature = min(first_feature + 32 * j, params.num_outputs - 1);
        const int64_t at = int64_t{row} * params.num_outputs + feature;
        if (params.float_residual) wide[i][j] = static_cast<const float*>(params.residual)[at];
        if (!params.float_residual) narrow[i][j] = static_cast<const uint16_t*>(params.residual)[at];
        gate[i][j] = gates[feature];
      }
    }
  }

  // residual + gate y
  __device__ __forceinline__ float around(const LinearRowsParams& params, int i, int j, float y) const {
    if (params.residual == nullptr) return y;
    return (params.float_residual ? wide[i][j] : value_of<Tile::kType>(narrow[i][j])) + value_of<Tile::kType>(gate[i][j]) * y;
  }
};

// What is stored of y where it counts, which may have fewer bits.
template <class Tile>
__device__ __forceinline__ float store_output(const LinearRowsParams& params, int row, int feature, bool counts, float y) {
  const int64_t at = int64_t{row} * params.num_outputs + feature;
  if (params.residual != nullptr && params.float_residual) {
    if (counts) static_cast<float*>(params.y)[at] = y;
    return y;
  }
  const auto number = static_cast<uint16_t>(pack<Tile::kType>(y, 0.0f));
  if (counts) static_cast<uint16_t*>(params.y)[at] = number;
  return value_of<Tile::kType>(number);
}

// Adds up what the blocks of the cluster have of rows from the first one on, and writes the outputs, by a warp. sums, feature:
// of this lane, which has those 32 further on too. surroundings: of the first rows.
template <class Tile>
__device__ __forceinline__ void store_outputs(const LinearRowsParams& params, const float* sums,
                                              Surroundings<Tile>& surroundings, int first_row, int row_step, int feature,
                                              const float (&bias)[2], int splits) {
  // NOTE: a block alone reads its shared memory as its own, which takes no way through the cluster's network.
  const int others = splits == 1 ? 0 : splits;
  const int tile = feature / kLinearFeatures, size = tile_size(params.num_outputs, tile);
  const int num_tiles = (params.num_outputs + kLinearFeatures - 1) / kLinearFeatures;
#pragma unroll 1
  for (int begin = first_row; begin < params.num_rows; begin += Tile::kRowsAtOnce * row_step) {
    if (begin != first_row) surroundings.load(params, begin, row_step, feature);
    float parts[Tile::kRowsAtOnce][2][kMaxLinearSplits], only[Tile::kRowsAtOnce][2];
#pragma unroll
    for (int i = 0; i < Tile::kRowsAtOnce; ++i) {
      const int row = begin + i * row_step;
      const bool valid = row < params.num_rows;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float* sum = sums + row * Tile::kSumsRow + 32 * j;
#pragma unroll
        for (int from = 0; from < kMaxLinearSplits; ++from) {
          parts[i][j][from] = valid && from < others ? load_cluster(sum, from) : 0.0f;
        }
        only[i][j] = valid && others == 0 ? *sum : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowsAtOnce; ++i) {
      const int row = begin + i * row_step;
      const bool valid = row < params.num_rows;
      float stored[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float y = bias[j] + only[i][j];
#pragma unroll
        for (int from = 0; from < kMaxLinearSplits; ++from) y += parts[i][j][from];
        // 0.5 (1 + tanh u) = 1 / (1 + 2^(-2 u log2 e)), and 2 sqrt(2 / pi) log2 e = 2.3022082
        if (params.gelu) y /= 1.0f + exp2_approx(-2.3022082f * (y + 0.044715f * y * y * y));
        y = surroundings.around(params, i, j, y);
        stored[j] = store_output<Tile>(params, row, feature + 32 * j, valid && feature + 32 * j < params.num_outputs, y);
      }
      if (params.statistics != nullptr) {
        const TileStatistics statistics = tile_statistics(stored, size);
        if (valid && threadIdx.x % 32 == 0) params.statistics[int64_t{row} * num_tiles + tile] = statistics;
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, 2) linear_rows_kernel(const __grid_constant__ LinearRowsParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  const int rank = cluster_rank(), splits = cluster_size();
  const int first_feature = blockIdx.x / splits * kLinearFeatures;
  const ChunkRange chunks(params, rank, splits);
  if (threadIdx.x == kGroupThreads) {
    barriers_init(shared.weight_full, 1), barriers_init(shared.weight_empty, kGroupThreads / 32);
    barriers_init(shared.x_full, Tile::kNormed ? warps_of_chunk<Tile>(params.num_rows) : 1);
    barriers_init(shared.x_empty, kGroupThreads / 32);
    fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= kGroupThreads) {
    if (threadIdx.x == kGroupThreads) fetch_weights<Tile>(params, shared, chunks, first_feature);
    if constexpr (Tile::kNormed) {
      if (threadIdx.x >= kGroupThreads + 32) norm_x<Tile>(params, shared, chunks);
    } else {
      if (threadIdx.x == kGroupThreads + 32) fetch_x<Tile>(params, shared, chunks);
    }
    cluster_arrive();
    if (threadIdx.x < kGroupThreads + 32 && params.next_mode > 0) {
      __syncwarp();
      read_ahead(params);
    }
    cluster_wait();
  } else {
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, feature = first_feature + lane;
    const int first_row = rank + splits * warp, row_step = splits * (kGroupThreads / 32);
    float bias[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (params.bias == nullptr || feature + 32 * j >= params.num_outputs) continue;
      bias[j] = value_of<Tile::kType>(static_cast<const uint16_t*>(params.bias)[feature + 32 * j]);
    }
    if constexpr (Tile::kNormed) {
      find_moments<Tile>(params, shared);
      named_barrier_arrive(kMomentsBarrier, kGroupThreads + 32 * kNormWarps);
    }
    float d[Tile::kRows / 2];
    multiply_rows<Tile>(shared, chunks, d);
    wait_for_previous();
    Surroundings<Tile> surroundings;
    surroundings.load(params, first_row, row_step, feature);
    group_sync(0);
    store_sums<Tile>(shared, d);
    cluster_sync();
    store_outputs<Tile>(params, shared.sums() + lane, surroundings, first_row, row_step, feature, bias, splits);
  }
  // NOTE: a block's shared memory is read by others until here.
  cluster_leave();
}

// Of x that another kernel wrote: one tile a warp.
template <DType kType>
__global__ void __launch_bounds__(32 * kStatisticsWarps)
row_statistics_kernel(const __grid_constant__ RowStatisticsParams params) {
  launch_dependents();
  wait_for_previous();
  const int row_blocks = (params.num_tiles + kStatisticsWarps - 1) / kStatisticsWarps, row = blockIdx.x / row_blocks;
  const int tile = blockIdx.x % row_blocks * kStatisticsWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (tile >= params.num_tiles) return;
  const int size = tile_size(params.num_inputs, tile);
  float x[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int64_t at = int64_t{row} * params.num_inputs + tile * kLinearFeatures + min(lane + 32 * j, size - 1);
    x[j] = params.float_x ? static_cast<const float*>(params.x)[at]
                          : value_of<kType>(static_cast<const uint16_t*>(params.x)[at]);
  }
  const TileStatistics statistics = tile_statistics(x, size);
  if (lane == 0) params.statistics[int64_t{row} * params.num_tiles + tile] = statistics;
}

}  // namespace hmar
