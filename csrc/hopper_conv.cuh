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
// mean and the deviation of what it stores, for a norm. On request x is the norm and SiLU of the map that a kSame kernel is given,
// silu(factor[n, c] map[n, y, x, c] + offset[n, c]): once for all taps the three warps beside the one that fetches put it in the
// place of the map in shared memory. On request a kSame kernel adds residual[n, y, x, o] + shift[o] to the sums, before they are
// rounded and statistics are made: the residual comes to where the output will be staged.
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
  static constexpr bool kNorms = kResolution == Resolution::kSame;  // where it is asked for
  static constexpr int kNormWarps = 3;
  // Of each thread: together as many as at the launch, of which 160 are sums.
  static constexpr int kComputeRegisters = kNorms ? 224 : 240, kFetchRegisters = kNorms ? 56 : 24;
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
    Barrier map_landed[kMapStages];  // with a norm, after which the map is full
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

template <class Tile>
__device__ __forceinline__ bool has_norm(const HopperConvParams& params) {
  return Tile::kNorms && params.factors != nullptr;
}

// One thread.
template <class Tile>
__device__ __forceinline__ void fetch_conv(const HopperConvParams& params, typename Tile::Shared& shared) {
  Barrier* landed = has_norm<Tile>(params) ? shared.map_landed : shared.map_full;
  RingPosition<Tile::kStages> ring;
  RingPosition<Tile::kMapStages> maps;
  for (int index = blockIdx.x; index < params.num_items; index += gridDim.x) {
    const ConvItem<Tile> item(params, index);
    for (int chunk = 0; chunk < params.num_chunks; ++chunk) {
      const int channel = chunk * kConvChannels;
      barrier_wait(shared.map_empty[maps.stage], maps.parity ^ 1);
      barrier_arrive_expecting(landed[maps.stage], Tile::kMapBytes);
      tma_load(shared.map[maps.stage], params.x, landed[maps.stage], channel, item.column - 1, item.row - 1,
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

// silu(factor x + offset) of eight numbers, given half of each factor and offset.
template <DType kType>
__device__ __forceinline__ uint4 normalised(const uint4& x, const float (&factors)[8], const float (&offsets)[8]) {
  uint32_t pairs[] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float y[2];
    unpack<kType>(pairs[i], y[0], y[1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float half = y[j] * factors[2 * i + j] + offsets[2 * i + j];
      y[j] = half * tanh_approx(half) + half;
    }
    pairs[i] = pack<kType>(y[0], y[1]);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Four numbers, halved.
__device__ __forceinline__ void load_halves(float* halves, const float* numbers) {
  const auto four = *reinterpret_cast<const float4*>(numbers);
  halves[0] = 0.5f * four.x, halves[1] = 0.5f * four.y, halves[2] = 0.5f * four.z, halves[3] = 0.5f * four.w;
}

// Norm and SiLU of each box, in its place, by kNormWarps warps; thread: of theirs. It has a chunk of channels of every
// kAtOnce-th position. What lies outside of the map stays zero.
template <class Tile>
__device__ __forceinline__ void normalise_maps(const HopperConvParams& params, typename Tile::Shared& shared, int thread) {
  constexpr int kChunks = Tile::kPositionBytes / kChunkBytes, kNumbers = kChunkBytes / 2;
  constexpr int kPositions = Tile::kMapRows * Tile::kMapColumns, kAtOnce = 32 * Tile::kNormWarps / kChunks;
  constexpr int kRounds = (kPositions + kAtOnce - 1) / kAtOnce, kRoundBytes = kAtOnce * Tile::kPositionBytes;
  static_assert(kAtOnce % 8 == 0, "a thread's chunk lies at the same place of all of its positions");
  static_assert(kRounds * kRoundBytes <= Tile::kMapStageBytes && kRounds <= 32 && kRounds % 2 == 0);
  const int first = thread / kChunks;
  const int place = first * Tile::kPositionBytes + ((thread % kChunks) ^ (first / 2 % 4)) * kChunkBytes;
  RingPosition<Tile::kMapStages> maps;
  for (int index = blockIdx.x; index < params.num_items; index += gridDim.x) {
    const ConvItem<Tile> item(params, index);
    uint32_t inside = 0;  // a bit a round
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      const int position = first + round * kAtOnce;
      const int row = item.row - 1 + position / Tile::kMapColumns, column = item.column - 1 + position % Tile::kMapColumns;
      const bool within = unsigned(row) < unsigned(params.height) && unsigned(column) < unsigned(params.width);
      inside |= uint32_t{within && position < kPositions} << round;
    }
    for (int chunk = 0; chunk < params.num_chunks; ++chunk) {
      const int channel = chunk * kConvChannels + thread % kChunks * kNumbers;
      const bool exists = channel < params.in_channels;
      float factors[kNumbers], offsets[kNumbers];  // halves
      if (exists) {
        const int64_t begin = int64_t{item.image} * params.in_channels + channel;
#pragma unroll
        for (int i = 0; i < kNumbers; i += 4) {
          load_halves(factors + i, params.factors + begin + i);
          load_halves(offsets + i, params.offsets + begin + i);
        }
      }
      barrier_wait(shared.map_landed[maps.stage], maps.parity);
      if (exists) {
        uint8_t* numbers = shared.map[maps.stage] + place;
#pragma unroll 1
        for (int round = 0; round < kRounds; round += 2, numbers += 2 * kRoundBytes) {
          auto *left = reinterpret_cast<uint4*>(numbers), *right = reinterpret_cast<uint4*>(numbers + kRoundBytes);
          const uint4 x[] = {*left, *right};
          const uint4 y[] = {normalised<Tile::kType>(x[0], factors, offsets), normalised<Tile::kType>(x[1], factors, offsets)};
          if (inside >> round & 1) *left = y[0];
          if (inside >> round & 2) *right = y[1];
        }
      }
      // NOTE: wgmma reads what these threads wrote as the copy engine would. No test on the CPU shows where this is missing.
      fence_async_proxy();
      release(shared.map_full[maps.stage]);
      maps.advance();
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

// The positions that a warp has of a block: two rows of eight. How many of them, and of their channels, there are.
template <class Tile>
struct WarpPositions {
  static constexpr int kChunks = kConvColumns * 2 / kChunkBytes, kNumChunks = Tile::kWarpPositions * kChunks;

  int64_t begin;  // of the output
  int num_rows, num_columns, num_channels;

  __device__ __forceinline__ WarpPositions(const HopperConvParams& params, const ConvItem<Tile>& item, int block) {
    const int group = uniform(threadIdx.x / kGroupThreads), warp = uniform(threadIdx.x / 32);
    const int row = item.row + block * kBlockSide + warp % 4 * 2, column = item.column + group * kBlockSide;
    begin = item.image * params.image_stride + item.parity_row * params.parity_row_stride +
            item.parity_column * params.parity_column_stride + row * int64_t{params.row_stride} +
            column * params.column_stride + item.out_channel;
    num_rows = params.height - row, num_columns = params.width - column;
    num_channels = params.out_channels - item.out_channel;
  }
  __device__ __forceinline__ bool has(unsigned position, int channel) const {
    const int row = position / kBlockSide, column = position % kBlockSide;
    return row < num_rows && column < num_columns && channel < num_channels;
  }
  // Of chunks of channels, position by position.
  __device__ __forceinline__ bool has_chunk(unsigned index) const { return has(index / kChunks, channel_of(index)); }
  __device__ __forceinline__ int64_t chunk_at(const HopperConvParams& params, unsigned index) const {
    return at(params, index / kChunks) + channel_of(index);
  }
  __device__ __forceinline__ int64_t at(const HopperConvParams& params, unsigned position) const {
    const int row = position / kBlockSide, column = position % kBlockSide;
    return begin + row * params.row_stride + column * params.column_stride;
  }
  // In the warp's part of shared memory.
  static __device__ __forceinline__ int staged_chunk(unsigned index) {
    return index / kChunks * Tile::kOutBytes + index % kChunks * kChunkBytes;
  }
  static __device__ __forceinline__ int channel_of(unsigned index) { return index % kChunks * (kChunkBytes / 2); }
};

// NOTE: else all that follows from it is computed before the loop over items, where there are no registers to keep it.
__device__ __forceinline__ int opaque_lane() { return int(opaque(threadIdx.x % 32)); }

// Of a lane, the row of `store_matrices` and `ldmatrix_x4` of a warp's positions by 16 channels.
template <class Tile>
__device__ __forceinline__ uint8_t* matrix_row(uint8_t* staging, int lane) {
  return staging + (lane % 8 + lane / 8 % 2 * 8) * Tile::kOutBytes + lane / 16 * kChunkBytes;
}

template <class Tile>
__device__ __forceinline__ bool has_residual(const HopperConvParams& params) {
  return Tile::kResolution == Resolution::kSame && params.residual != nullptr;
}

// Starts to copy a warp's residual of a block into its part of shared memory; what there is none of will be zero.
template <class Tile>
__device__ __forceinline__ void fetch_residual(const HopperConvParams& params, const WarpPositions<Tile>& positions,
                                               uint8_t* staging) {
  const auto* residual = static_cast<const uint16_t*>(params.residual);
  const int lane = opaque_lane();
  static_assert(WarpPositions<Tile>::kNumChunks % 32 == 0);
#pragma unroll 5
  for (int i = 0; i < WarpPositions<Tile>::kNumChunks / 32; ++i) {
    const int index = lane + 32 * i;
    const bool exists = positions.has_chunk(index);
    cp_async_16(shared_address(staging + WarpPositions<Tile>::staged_chunk(index)),
                residual + (exists ? positions.chunk_at(params, index) : 0), exists);
  }
  cp_async_commit();
}

// Brings it nearer.
template <class Tile>
__device__ __forceinline__ void prefetch_residual(const HopperConvParams& params, const WarpPositions<Tile>& positions) {
  const int position = opaque_lane();
  if (position < Tile::kWarpPositions && positions.has(position, 0)) {
    prefetch_bytes(static_cast<const uint16_t*>(params.residual) + positions.at(params, position),
                   2 * min(kConvColumns, positions.num_channels));
  }
}

// Adds what was fetched to the sums of a block.
template <class Tile>
__device__ __forceinline__ void add_residual(float (&d)[kConvColumns / 2], uint8_t* staging) {
  cp_async_wait<0>();
  __syncwarp();
  const uint32_t row = shared_address(matrix_row<Tile>(staging, opaque_lane()));
#pragma unroll
  for (int n = 0; n < kConvColumns / 8; n += 2) {
    uint32_t matrices[4];
    ldmatrix_x4(matrices, row + n * kChunkBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low, high;
      unpack<Tile::kType>(matrices[i], low, high);
      d[4 * n + 2 * i] += low, d[4 * n + 2 * i + 1] += high;
    }
  }
  __syncwarp();
}

// Adds to all sums of a channel its number of `constants`, where there are any.
template <class Tile>
__device__ __forceinline__ void add_constants(const HopperConvParams& params, const void* constants, int out_channel,
                                              float (&d)[Tile::kBlocks][kConvColumns / 2]) {
  if (constants == nullptr) return;
  const int first = out_channel + opaque_lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kConvColumns / 8; ++n) {
    float low = 0.0f, high = 0.0f;
    if (first + 8 * n < params.out_channels) {
      unpack<Tile::kType>(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(constants) + first + 8 * n), low,
                          high);
    }
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      float* pairs = d[block] + 4 * n;
      pairs[0] += low, pairs[1] += high, pairs[2] += low, pairs[3] += high;
    }
  }
}

// Rounds one block of a warpgroup and writes those of a warp's positions and channels that there are.
template <class Tile>
__device__ __forceinline__ void store_block(const HopperConvParams& params, const WarpPositions<Tile>& positions,
                                            const float (&d)[kConvColumns / 2], uint8_t* staging) {
  const int lane = opaque_lane();
  uint8_t* row = matrix_row<Tile>(staging, lane);
#pragma unroll
  for (int n = 0; n < kConvColumns / 8; n += 2) {
    uint32_t matrices[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) matrices[i] = pack<Tile::kType>(d[4 * n + 2 * i], d[4 * n + 2 * i + 1]);
    store_matrices(row + n * kChunkBytes, matrices);
  }
  __syncwarp();
  auto* out = static_cast<uint16_t*>(params.out);
  constexpr int kAtOnce = 5;
#pragma unroll 1
  for (int first = lane; first < WarpPositions<Tile>::kNumChunks; first += 32 * kAtOnce) {
    uint4 numbers[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      numbers[i] = *reinterpret_cast<const uint4*>(staging + WarpPositions<Tile>::staged_chunk(first + 32 * i));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = first + 32 * i;
      if (positions.has_chunk(index)) *reinterpret_cast<uint4*>(out + positions.chunk_at(params, index)) = numbers[i];
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
    // What is added comes while the products are made: of the first block to shared memory, which has no room for the other.
    if (has_residual<Tile>(params)) {
      fetch_residual<Tile>(params, {params, item, 0}, shared.out[warp]);
      if constexpr (Tile::kBlocks > 1) prefetch_residual<Tile>(params, {params, item, 1});
    }
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
    if (has_residual<Tile>(params)) {
      add_residual<Tile>(d[0], shared.out[warp]);
      if constexpr (Tile::kBlocks > 1) fetch_residual<Tile>(params, {params, item, 1}, shared.out[warp]);
      add_constants<Tile>(params, params.shift, item.out_channel, d);
    }
    add_constants<Tile>(params, params.bias, item.out_channel, d);
    if constexpr (Tile::kBlocks > 1) {
      if (has_residual<Tile>(params)) add_residual<Tile>(d[1], shared.out[warp]);
    }
    if (params.means != nullptr) {
      const int64_t chunk = int64_t{Tile::kGroups} * (index / params.num_column_tiles) + group;
      store_statistics<Tile>(params, item.out_channel, chunk, d, group, shared.out);
    }
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      store_block<Tile>(params, {params, item, block}, d[block], shared.out[warp]);
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
    barriers_init(shared.map_full, has_norm<Tile>(params) ? Tile::kNormWarps : 1);
    barriers_init(shared.map_empty, kWarps), barriers_init(shared.map_landed, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Tile::kGroups * kGroupThreads) {
    give_registers<Tile::kFetchRegisters>();
    const int thread = threadIdx.x - Tile::kGroups * kGroupThreads;
    if (thread == 0) {
      fetch_conv<Tile>(params, shared);
    } else if (thread >= 32 && has_norm<Tile>(params)) {
      normalise_maps<Tile>(params, shared, thread - 32);
    }
  } else {
    take_registers<Tile::kComputeRegisters>();
    compute_conv<Tile>(params, shared);
  }
}

}  // namespace hmar
