// Block-sparse attention forward for GPUs from sm_80 on: mma.sync, ldmatrix, cp.async.
//
//   out[i] = sum_j p_ij v_j / sum_j p_ij,   p_ij = exp(scale q_i . k_j),   key_start[i] <= j < key_end[i]
//   lse[i] = ln sum_j p_ij;   a row without keys has out = 0 and lse = -inf
//
// Grid: one block a pair (query tile of the plan, batch and head), in one dimension, tiles fastest. The tiles of one
// head run side by side, so its keys and values are read from memory once and then from L2; the last head runs
// through its tiles in the plan's order, longest first.
// A block owns kBlockM rows and passes over the keys of its tile in blocks of kBlockN, kStages of them in shared
// memory. A warp owns kRowsPerWarp whole rows, so that softmax never leaves it. In float32: logits, probabilities until
// they meet v, accumulator, sums, lse.
#pragma once

#include "ptx.cuh"

namespace hmar {

template <DType kType_, int kHeadDim_, int kBlockM_, int kBlockN_, int kNumWarps_, int kStages_, int kBlocksPerSM_>
struct ForwardTile {
  static constexpr DType kType = kType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSM = kBlocksPerSM_;

  static constexpr int kNumThreads = 32 * kNumWarps_;
  static constexpr int kRowsPerWarp = kBlockM / kNumWarps_;
  static constexpr int kTilesM = kRowsPerWarp / 16;  // mma tiles a warp: rows, keys, output columns
  static constexpr int kTilesN = kBlockN / 8;
  static constexpr int kTilesD = kHeadDim / 8;
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kChunksPerRow = kRowBytes / 16;

  // Queries stay in registers while they take at most 32 of them; otherwise they are read again for every block.
  static constexpr bool kQueriesInRegisters = kTilesM * kHeadDim / 4 <= 32;

  static_assert(kHeadDim == 64 || kHeadDim == 128);
  static_assert(kRowsPerWarp % 16 == 0 && kBlockN % 16 == 0 && kStages >= 2);
  static_assert(kBlockM <= kNumThreads);
  static_assert(kBlockM % (kNumThreads / kChunksPerRow) == 0 && kBlockN % (kNumThreads / kChunksPerRow) == 0);
  static_assert((kNumThreads / kChunksPerRow) % 8 == 0, "a thread keeps its swizzled chunk from pass to pass");

  struct Shared {
    alignas(256) uint8_t q[kBlockM * kRowBytes];  // later the warp's rows of the output
    alignas(256) uint8_t k[kStages][kBlockN * kRowBytes];
    alignas(256) uint8_t v[kStages][kBlockN * kRowBytes];
    int32_t key_start[kBlockM];
    int32_t key_end[kBlockM];
  };
};

// A row is kRowBytes long; its 16-byte chunk c lies at place c ^ (row % 8). Eight rows of one chunk (an ldmatrix
// operand) and eight chunks of one row (a cp.async) then fall into the 8 different 16-byte bank groups.
// NOTE: with hi 0 or 1, `swizzled(row, hi) ^ (32 * step)` is `swizzled(row, 2 * step + hi)`: 2 * step and hi share no
// bits, and rows begin at multiples of kRowBytes. So a lane keeps one address an operand.
template <class Tile>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * Tile::kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Starts the copy of the next kRows rows into shared memory; rows from num_valid on become zeros. `src` is this
// thread's chunk of its first row and moves on by kRows rows.
template <class Tile, int kRows>
__device__ __forceinline__ void copy_rows(uint32_t dst, const uint16_t*& src, int64_t row_stride, int num_valid) {
  constexpr int kRowsPerPass = Tile::kNumThreads / Tile::kChunksPerRow;
  const int first_row = threadIdx.x / Tile::kChunksPerRow;
  dst += swizzled<Tile>(first_row, threadIdx.x % Tile::kChunksPerRow);
#pragma unroll
  for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
    const int row = pass * kRowsPerPass;
    cp_async_16(dst + row * Tile::kRowBytes, src, first_row + row < num_valid);
    src += kRowsPerPass * row_stride;
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kBlocksPerSM)
    attention_forward_kernel(const __grid_constant__ AttentionForwardParams params) {
  constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kStages = Tile::kStages;
  constexpr int kTilesM = Tile::kTilesM, kTilesN = Tile::kTilesN, kTilesD = Tile::kTilesD;
  constexpr int kStepsD = Tile::kHeadDim / 16, kStepsN = kBlockN / 16;
  constexpr int kQuerySteps = Tile::kQueriesInRegisters ? kStepsD : 1;
  constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;
  // The accumulator is rescaled when a row's largest probability would exceed 2^8: sums in float32 and probabilities up
  // to 256 in 16 bits lose nothing, and after the first block it is rare.
  constexpr float RESCALE_ABOVE = 8.0f;

  extern __shared__ __align__(256) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);

  // ids
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, pair = 2 * (lane % 4);  // this lane's row and first column in an mma tile
  const int warp_row = warp * Tile::kRowsPerWarp;
  const int batch_head = blockIdx.x / params.num_tiles;
  const int batch = batch_head / params.num_heads, head = batch_head % params.num_heads;
  const int32_t* tile = params.plan + static_cast<int64_t>(blockIdx.x % params.num_tiles) * PLAN_COLUMNS;
  const int row_begin = tile[ROW_BEGIN], num_rows = tile[ROW_END] - row_begin;
  const int key_begin = tile[KEY_BEGIN], num_keys = tile[KEY_END] - key_begin;
  const int full_begin = tile[FULL_BEGIN] - key_begin, full_end = tile[FULL_END] - key_begin;
  const int num_blocks = num_keys > 0 ? (num_keys + kBlockN - 1) / kBlockN : 0;

  // offsets
  const int thread_row = threadIdx.x / Tile::kChunksPerRow, thread_chunk = threadIdx.x % Tile::kChunksPerRow;
  const auto offset = [&](const Strides& strides, int row) {
    return batch * strides.batch + head * strides.head + row * strides.row + thread_chunk * 8;
  };
  const auto* q = static_cast<const uint16_t*>(params.q) + offset(params.q_strides, row_begin + thread_row);
  const auto* k = static_cast<const uint16_t*>(params.k) + offset(params.k_strides, key_begin + thread_row);
  const auto* v = static_cast<const uint16_t*>(params.v) + offset(params.v_strides, key_begin + thread_row);
  const uint32_t q_lane = shared_address(shared.q) + swizzled<Tile>(warp_row + lane % 16, lane / 16);
  const uint32_t k_lane = shared_address(shared.k) + swizzled<Tile>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t v_lane = shared_address(shared.v) + swizzled<Tile>(lane % 16, lane / 16);

  const auto copy_block = [&](int block) {  // called once a block, in order
    const int stage = block % kStages, num_valid = num_keys - block * kBlockN;
    copy_rows<Tile, kBlockN>(shared_address(shared.k[stage]), k, params.k_strides.row, num_valid);
    copy_rows<Tile, kBlockN>(shared_address(shared.v[stage]), v, params.v_strides.row, num_valid);
  };

  // first loads: group b holds block b, and the queries travel with block 0
  copy_rows<Tile, kBlockM>(shared_address(shared.q), q, params.q_strides.row, num_rows);
#pragma unroll
  for (int block = 0; block < kStages - 1; ++block) {
    if (block < num_blocks) copy_block(block);
    cp_async_commit();
  }
  if (threadIdx.x < kBlockM) {
    const int row = threadIdx.x;
    shared.key_start[row] = row < num_rows ? params.key_start[row_begin + row] - key_begin : 0;
    shared.key_end[row] = row < num_rows ? params.key_end[row_begin + row] - key_begin : 0;
  }
  cp_async_wait<kStages - 2>();
  __syncthreads();

  uint32_t q_frag[kTilesM][kQuerySteps][4];
  const auto load_queries = [&](int step, int slot) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      ldmatrix_x4(q_frag[m][slot], (q_lane ^ (step * 32)) + m * 16 * Tile::kRowBytes);
    }
  };
  if constexpr (Tile::kQueriesInRegisters) {
#pragma unroll
    for (int step = 0; step < kStepsD; ++step) load_queries(step, step);
  }

  const float scale_log2 = params.scale * LOG2_E;
  float o[kTilesM][kTilesD][4] = {};
  float row_sum[kTilesM][2] = {};  // rows `group` and `group` + 8 of each tile; this lane's columns only
  float row_max[kTilesM][2];       // log2 units; at most RESCALE_ABOVE below the maximum so far
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;

  for (int block = 0; block < num_blocks; ++block) {
    // NOTE: the stage that is filled here held block - 1, which every warp left before the barrier at the loop's end.
    if (block + kStages - 1 < num_blocks) copy_block(block + kStages - 1);
    cp_async_commit();
    const int stage_bytes = block % kStages * kBlockN * Tile::kRowBytes;

    // s = q k^T
    float s[kTilesM][kTilesN][4] = {};
#pragma unroll
    for (int step = 0; step < kStepsD; ++step) {
      if constexpr (!Tile::kQueriesInRegisters) load_queries(step, 0);
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t k_frag[4];
        ldmatrix_x4(k_frag, ((k_lane + stage_bytes) ^ (step * 32)) + n * 8 * Tile::kRowBytes);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          const auto& a = q_frag[m][Tile::kQueriesInRegisters ? step : 0];
          mma_m16n8k16<Tile::kType>(s[m][n], a, k_frag[0], k_frag[1]);
          mma_m16n8k16<Tile::kType>(s[m][n + 1], a, k_frag[2], k_frag[3]);
        }
      }
    }

    // mask, at the edges only
    const int first_key = block * kBlockN;
    if (first_key < full_begin || first_key + kBlockN > full_end) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + m * 16 + half * 8 + group;
          const int begin = shared.key_start[row] - first_key - pair;
          const int end = shared.key_end[row] - first_key - pair;
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (n * 8 + c < begin || n * 8 + c >= end) s[m][n][2 * half + c] = -INFINITY;
            }
          }
        }
      }
    }

    // running maximum, rescaled lazily
    float block_max[kTilesM][2];
    bool grows = false;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        block_max[m][half] = quad_max(x) * scale_log2;
        grows |= block_max[m][half] > row_max[m][half] + RESCALE_ABOVE;
      }
    }
    if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // NOTE: each row decides for itself, so that its bits do not depend on its neighbours in the tile.
          if (block_max[m][half] > row_max[m][half] + RESCALE_ABOVE) {
            const float factor = exp2_approx(row_max[m][half] - block_max[m][half]);
            row_max[m][half] = block_max[m][half];
            row_sum[m][half] *= factor;
#pragma unroll
            for (int d = 0; d < kTilesD; ++d) {
              o[m][d][2 * half] *= factor;
              o[m][d][2 * half + 1] *= factor;
            }
          }
        }
      }
    }

    // p = exp2(s - max)
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = row_max[m][half] == -INFINITY ? 0.0f : row_max[m][half];
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            s[m][n][c] = exp2_approx(fmaf(s[m][n][c], scale_log2, -offset));
            sum += s[m][n][c];
          }
        }
        row_sum[m][half] += sum;
      }
    }

    // o += p v
#pragma unroll
    for (int step = 0; step < kStepsN; ++step) {
      uint32_t p_frag[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto& c = s[m][2 * step + j / 2];
          p_frag[m][j] = pack<Tile::kType>(c[2 * (j % 2)], c[2 * (j % 2) + 1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kTilesD; d += 2) {
        uint32_t v_frag[4];
        ldmatrix_x4_trans(v_frag, ((v_lane + stage_bytes) ^ (d * 16)) + step * 16 * Tile::kRowBytes);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          mma_m16n8k16<Tile::kType>(o[m][d], p_frag[m], v_frag[0], v_frag[1]);
          mma_m16n8k16<Tile::kType>(o[m][d + 1], p_frag[m], v_frag[2], v_frag[3]);
        }
      }
    }

    // block + 1 has arrived: groups 0 .. block + kStages - 1 are committed, all but the last kStages - 2 complete
    cp_async_wait<kStages - 2>();
    __syncthreads();
  }

  // normalise; the output takes the place of the warp's own queries
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + group;
      const float sum = quad_sum(row_sum[m][half]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int d = 0; d < kTilesD; ++d) {
        *reinterpret_cast<uint32_t*>(shared.q + swizzled<Tile>(row, d) + 2 * pair) =
            pack<Tile::kType>(o[m][d][2 * half] * inverse, o[m][d][2 * half + 1] * inverse);
      }
      if (pair == 0 && row < num_rows) {
        const float lse = sum == 0.0f ? -INFINITY : (row_max[m][half] + log2f(sum)) * LN_2;
        params.lse[static_cast<int64_t>(batch_head) * params.num_queries + row_begin + row] = lse;
      }
    }
  }
  __syncwarp();

  // stores
  constexpr int kRowsPerPass = 32 / Tile::kChunksPerRow;
  const int first_row = warp_row + lane / Tile::kChunksPerRow;
  auto* out = static_cast<uint16_t*>(params.out) + offset(params.out_strides, row_begin + first_row);
#pragma unroll
  for (int pass = 0; pass < Tile::kRowsPerWarp / kRowsPerPass; ++pass) {
    const int row = first_row + pass * kRowsPerPass;
    if (row < num_rows) {
      *reinterpret_cast<uint4*>(out + pass * kRowsPerPass * params.out_strides.row) =
          *reinterpret_cast<const uint4*>(shared.q + swizzled<Tile>(row, thread_chunk));
    }
  }
}

}  // namespace hmar
