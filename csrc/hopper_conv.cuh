// Convolutions of channels-last maps for sm_90a, without a buffer of taps: copy engine, wgmma, persistent blocks.
//
//   kSame      out[n, y, x, o] = bias[o] + sum_{dy, dx, c} x[n, y + dy - 1, x + dx - 1, c] w[o, 3 dy + dx, c],  dy, dx < 3
//   kDoubled   out[n, 2 y + p, 2 x + q, o] = the same over dy, dx < 2 of x[n, y + p + dy - 1, x + q + dx - 1, c]
//              w[o, 4 (3 - 2 dy - p) + 3 - 2 dx - q, c]: a transposed convolution of 4 x 4 taps and stride 2
//
// An item is a patch of 16 columns and 8 kBlocks rows of the map, 160 output channels and, of kDoubled, one parity (p, q). Each
// of two warpgroups owns 8 columns, a block of 8 rows of them to an accumulator of 64 rows. One step is a tap and 32 input
// channels. Weights come step by step; the map comes once for all taps, the patch with its neighbours, and a tap is another
// place to begin in it. What lies outside of the map reads as zero, which is the padding. Sums are float32. The second
// warpgroup begins some steps late and stays behind, so that one multiplies while the other stores. On request each gives the
// mean and the deviation of what it stores, for a norm.
#pragma once

#include "hopper_tile.cuh"

namespace hmar {

constexpr int kChunkBytes = 16;

enum class Resolution { kSame, kDoubled };

template <DType kType_, Resolution kResolution_, int kBlocks_, int kStages_, int kMapStages_>
struct HopperConvTile {
  static constexpr DType kType = kType_;
  static constexpr Resolution kResolution = kResolution_;
  static constexpr int kBlocks = kBlocks_, kStages = kStages_, kMapStages = kMapStages_;

  static constexpr int kGroups = 2;
  static constexpr int kNumThreads = (kGroups + 1) * kGroupThreads;
  // Of each thread: together as many as at the launch, of which 160 are sums.
  static constexpr int kComputeRegisters = 240, kFetchRegisters = 24;
  static_assert(kGroups * kComputeRegisters + kFetchRegisters <= (kGroups + 1) * 168);
  static constexpr int kSide = kResolution == Resolution::kSame ? 3 : 2;  // taps in either direction
  static constexpr int kParities = kResolution == Resolution::kSame ? 1 : 4;
  static constexpr int kPatchRows = kBlockSide * kBlocks;
  // Steps that the second warpgroup is behind: what is left of the ring covers the latency of memory.
  static constexpr int kLead = kBlocks > 1 ? kStages - 4 : kStages / 2;
  static_assert(kLead > 0 && kLead <= (kMapStages - 1) * kSide * kSide);

  static constexpr int kMapRows = kPatchRows + 2, kMapColumns = kPatchColumns + 2;  // of a box
  static constexpr int kPositionBytes = kConvChannels * 2;
  static constexpr int kMapBytes = kMapRows * kMapColumns * kPositionBytes;
  static constexpr int kMapStageBytes = (kMapBytes + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = kConvColumns * kConvChannels * 2;
  // Of an output position in shared memory: a chunk more than it has, so that eight positions lie in different banks.
  static constexpr int kOutBytes = kConvColumns * 2 + kChunkBytes;
  static constexpr int kWarpPositions = 16;

  struct Shared {
    alignas(1024) uint8_t weight[kStages][kWeightBytes];
    alignas(1024) uint8_t map[kMapStages][kMapStageBytes];
    alignas(128) uint8_t out[4 * kGroups][kWarpPositions * kOutBytes];
    Barrier weight_full[kStages], weight_empty[kStages];
    Barrier map_full[kMapStages], map_empty[kMapStages];
  };
};

// Where an item is. Those of the same patch follow each other.
template <class Tile>
struct ConvItem {
  int image, row, column;  // of the patch's first position
  int parity_row, parity_column;
  int out_channel;

  __device__ __forceinline__ ConvItem(const HopperConvParams& params, int item) {
    out_channel = item % params.num_column_tiles * kConvColumns;
    item /= params.num_column_tiles;
    const int parity = item % Tile::kParities;
    item /= Tile::kParities;
    parity_row = parity / 2, parity_column = parity % 2;
    column = item % params.num_patch_columns * kPatchColumns;
    item /= params.num_patch_columns;
    row = item % params.num_patch_rows * Tile::kPatchRows;
    image = item / params.num_patch_rows;
  }
  // Of the weights: tap (row, column) of the patch.
  __device__ __forceinline__ int weight_tap(int tap_row, int tap_column) const {
    if constexpr (Tile::kResolution == Resolution::kSame) return 3 * tap_row + tap_column;
    return 4 * (3 - 2 * tap_row - parity_row) + 3 - 2 * tap_column - parity_column;
  }
};

// One thread.
template <class Tile>
__device__ __forceinline__ void fetch_conv(const HopperConvParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kStages> ring;
  RingPosition<Tile::kMapStages> maps;
  for (int index = blockIdx.x; index < params.num_items; index += gridDim.x) {
    const ConvItem<Tile> item(params, index);
    for (int chunk = 0; chunk < params.num_chunks; ++chunk) {
      const int channel = chunk * kConvChannels;
      barrier_wait(shared.map_empty[maps.stage], maps.parity ^ 1);
      barrier_arrive_expecting(shared.map_full[maps.stage], Tile::kMapBytes);
      tma_load(shared.map[maps.stage], params.x, shared.map_full[maps.stage], channel, item.column - 1, item.row - 1,
               item.image);
      maps.advance();
#pragma unroll 1  // of few registers
      for (int tap = 0; tap < Tile::kSide * Tile::kSide; ++tap) {
        barrier_wait(shared.weight_empty[ring.stage], ring.parity ^ 1);
        barrier_arrive_expecting(shared.weight_full[ring.stage], Tile::kWeightBytes);
        tma_load(shared.weight[ring.stage], params.weight, shared.weight_full[ring.stage], channel,
                 item.weight_tap(tap / Tile::kSide, tap % Tile::kSide), item.out_channel);
        ring.advance();
      }
    }
  }
}

// Descriptor of rows of 64 bytes as the copy engine's 64-byte swizzle leaves them, `K-major`: chunk c of row r at
// c ^ (r / 2 % 4), groups of eight rows group_bytes apart. Chunks are exchanged by bits of their addresses, so that rows may
// begin anywhere.
__device__ __forceinline__ uint64_t half_row_descriptor(const uint8_t* rows, int group_bytes) {
  const uint64_t address = (shared_address(rows) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t(group_bytes >> 4) << 32 | uint64_t{2} << 62;
}

// Rounds one block of a warpgroup and writes those of its positions and channels that there are. A warp owns two rows.
template <class Tile>
__device__ __forceinline__ void store_block(const HopperConvParams& params, const ConvItem<Tile>& item,
                                            const float (&d)[kConvColumns / 2], uint8_t* staging, int first_row,
                                            int first_column) {
  int lane = threadIdx.x % 32;
  // NOTE: else all that follows from it is computed before the loop over items, where there are no registers to keep it.
  asm volatile("" : "+r"(lane));
  uint8_t* matrix_row = staging + (lane % 8 + lane / 8 % 2 * 8) * Tile::kOutBytes + lane / 16 * kChunkBytes;
  const auto* bias = static_cast<const uint16_t*>(params.bias);
#pragma unroll
  for (int n = 0; n < kConvColumns / 8; n += 2) {
    uint32_t matrices[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = item.out_channel + 8 * (n + i) + lane % 4 * 2;
      float low = 0.0f, high = 0.0f;
      if (bias != nullptr && channel < params.out_channels) {
        unpack<Tile::kType>(*reinterpret_cast<const uint32_t*>(bias + channel), low, high);
      }
      const float* pair = d + 4 * (n + i);
      matrices[2 * i] = pack<Tile::kType>(pair[0] + low, pair[1] + high);
      matrices[2 * i + 1] = pack<Tile::kType>(pair[2] + low, pair[3] + high);
    }
    store_matrices(matrix_row + n * kChunkBytes, matrices);
  }
  __syncwarp();
  constexpr int kChunks = kConvColumns * 2 / kChunkBytes;
  auto* out = static_cast<uint16_t*>(params.out) + item.image * params.image_stride +
              item.parity_row * params.parity_row_stride + item.parity_column * params.parity_column_stride +
              first_row * int64_t{params.row_stride} + first_column * params.column_stride + item.out_channel;
  const int num_rows = params.height - first_row, num_columns = params.width - first_column;
  const int num_channels = params.out_channels - item.out_channel;
  constexpr int kAtOnce = 5;
#pragma unroll 1
  for (int first = lane; first < Tile::kWarpPositions * kChunks; first += 32 * kAtOnce) {
    uint4 numbers[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned index = first + 32 * i;
      numbers[i] = *reinterpret_cast<const uint4*>(staging + index / kChunks * Tile::kOutBytes +
                                                   index % kChunks * kChunkBytes);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned index = first + 32 * i, position = index / kChunks;
      const int row = position / kBlockSide, column = position % kBlockSide;
      const int channel = index % kChunks * (kChunkBytes / 2);
      if (row < num_rows && column < num_columns && channel < num_channels) {
        *reinterpret_cast<uint4*>(out + row * params.row_stride + column * params.column_stride + channel) = numbers[i];
      }
    }
  }
  __syncwarp();
}

// Sum over the lanes that hold other rows of the same columns.
__device__ __forceinline__ float sum_over_rows(float x) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// Mean and sum of squared distances from it of each of a warpgroup's columns: of each warp's rows, then of all by Chan's rule.
// staging: each warp's.
template <class Tile>
__device__ __forceinline__ void store_statistics(const HopperConvParams& params, int out_channel, int64_t chunk,
                                                 const float (&d)[Tile::kBlocks][kConvColumns / 2], int group,
                                                 uint8_t (&staging)[4 * Tile::kGroups][Tile::kWarpPositions * Tile::kOutBytes]) {
  constexpr int kWarps = 4, kRows = Tile::kWarpPositions * Tile::kBlocks;
  const int lane = threadIdx.x % 32;
  auto* own = reinterpret_cast<float*>(staging[threadIdx.x / 32]);
#pragma unroll
  for (int n = 0; n < kConvColumns / 8; ++n) {
    float x[2][2 * Tile::kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
      const float* pair = d[i / 2] + 4 * n + i % 2 * 2;
      unpack<Tile::kType>(pack<Tile::kType>(pair[0], pair[1]), x[0][i], x[1][i]);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * Tile::kBlocks; ++i) sum += x[c][i];
      const float mean = sum_over_rows(sum) * (1.0f / kRows);
#pragma unroll
      for (int i = 0; i < 2 * Tile::kBlocks; ++i) squares += (x[c][i] - mean) * (x[c][i] - mean);
      squares = sum_over_rows(squares);
      if (lane < 4) {
        const int column = 8 * n + 2 * lane + c;
        own[column] = mean, own[kConvColumns + column] = squares;
      }
    }
  }
  group_sync(group);
  for (int column = threadIdx.x % kGroupThreads; column < kConvColumns; column += kGroupThreads) {
    float means[kWarps], mean = 0.0f, squares = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const auto* of_warp = reinterpret_cast<const float*>(staging[group * kWarps + warp]);
      means[warp] = of_warp[column], squares += of_warp[kConvColumns + column];
      mean += means[warp] * (1.0f / kWarps);
    }
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) squares += kRows * (means[warp] - mean) * (means[warp] - mean);
    if (out_channel + column < params.out_channels) {
      params.means[chunk * params.out_channels + out_channel + column] = mean;
      params.deviations[chunk * params.out_channels + out_channel + column] = squares;
    }
  }
  group_sync(group);
}

template <class Tile>
__device__ __forceinline__ void compute_conv(const HopperConvParams& params, typename Tile::Shared& shared) {
  const int group = uniform(threadIdx.x / kGroupThreads), warp = uniform(threadIdx.x / 32);
  const int num_steps = params.num_chunks * Tile::kSide * Tile::kSide;
  const int lead = num_steps < Tile::kLead ? num_steps : Tile::kLead;
  RingPosition<Tile::kStages> ring;
  RingPosition<Tile::kMapStages> maps;
  float d[Tile::kBlocks][kConvColumns / 2];
  constexpr int kMapRowBytes = Tile::kMapColumns * Tile::kPositionBytes;
  for (int index = blockIdx.x; index < params.num_items; index += gridDim.x) {
    const ConvItem<Tile> item(params, index);
    const bool first_item = index == int(blockIdx.x);
    if (first_item && group == 1) turn_wait<Tile::kGroups>(1);
    int step = 0;
    for (int chunk = 0; chunk < params.num_chunks; ++chunk) {
      barrier_wait(shared.map_full[maps.stage], maps.parity);
      for (int tap = 0; tap < Tile::kSide * Tile::kSide; ++tap, ++step) {
        barrier_wait(shared.weight_full[ring.stage], ring.parity);
        const int row = item.parity_row + tap / Tile::kSide;
        const int column = item.parity_column + tap % Tile::kSide + group * kBlockSide;
        const uint8_t* begin = shared.map[maps.stage] + row * kMapRowBytes + column * Tile::kPositionBytes;
        const uint64_t a = half_row_descriptor(begin, kMapRowBytes);
        const uint64_t b = half_row_descriptor(shared.weight[ring.stage], kBlockSide * kConvChannels * 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kConvChannels / 16; ++k) {
#pragma unroll
          for (int block = 0; block < Tile::kBlocks; ++block) {
            wgmma<Tile::kType, false>(d[block], advanced(a, block * kBlockSide * kMapRowBytes + k * 32),
                                      advanced(b, k * 32), step > 0 || k > 0);
          }
        }
        wgmma_commit();
        // The products of the step before are done: their buffers are free.
        wgmma_wait<1>();
        if (step > 0) {
          release(shared.weight_empty[ring.last_stage()]);
          if (tap == 0) release(shared.map_empty[maps.last_stage()]);
        }
        ring.advance();
        if (first_item && group == 0 && step + 1 == lead) turn_pass<Tile::kGroups>(0);
      }
      maps.advance();
    }
    wgmma_wait<0>();
    release(shared.weight_empty[ring.last_stage()]);
    release(shared.map_empty[maps.last_stage()]);
    if (params.means != nullptr) {
      const int64_t chunk = int64_t{Tile::kGroups} * (index / params.num_column_tiles) + group;
      store_statistics<Tile>(params, item.out_channel, chunk, d, group, shared.out);
    }
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      store_block<Tile>(params, item, d[block], shared.out[warp], item.row + block * kBlockSide + warp % 4 * 2,
                        item.column + group * kBlockSide);
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, 1)
    hopper_conv_kernel(const __grid_constant__ HopperConvParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;
    barriers_init(shared.weight_full, 1), barriers_init(shared.weight_empty, kWarps);
    barriers_init(shared.map_full, 1), barriers_init(shared.map_empty, kWarps);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Tile::kGroups * kGroupThreads) {
    give_registers<Tile::kFetchRegisters>();
    if (threadIdx.x == Tile::kGroups * kGroupThreads) fetch_conv<Tile>(params, shared);
  } else {
    take_registers<Tile::kComputeRegisters>();
    compute_conv<Tile>(params, shared);
  }
}

}  // namespace hmar
