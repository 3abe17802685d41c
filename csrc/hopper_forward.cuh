// Block-sparse attention forward for sm_90a: copy engine, wgmma, one fetching warp, persistent blocks.
//
//   out[i] = sum_j p_ij v_j / sum_j p_ij,   p_ij = exp(scale q_i . k_j),   key_start[i] <= j < key_end[i]
//   lse[i] = log2 sum_j p_ij;   a row without keys has out = 0 and lse = +inf, which makes its p zero in the backward
//
// A warpgroup owns 64 queries. How arithmetic and matrix units overlap is one of Overlap. Where logits are bounded, exp2 needs no
// offset: float32 and bfloat16 hold 2^-100 to 2^100 and any sum of these; otherwise each row has one, which is looked at again
// only when sums grow. In float32: logits, probabilities until they meet v, accumulator, sums, lse.
#pragma once

#include "hopper_tile.cuh"

namespace hmar {

// Largest |logit| in log2 units for which no offset is needed.
constexpr float kBoundedLog2 = 100.0f;

enum class Overlap {
  kNone,    // a warpgroup waits for every product of its own: others fill the gaps
  kInTurn,  // p v of a block runs while the next one is exponentiated, and the warpgroups issue their products in turn, so
            // that one exponentiates while another multiplies
  kBehind,  // as kInTurn, in no order
};

template <DType kType_, int kHeadDim_, int kGroups_, int kBlockN_, int kStages_, Overlap kOverlap_, int kBlocksPerSM_>
struct HopperForwardTile {
  static constexpr DType kType = kType_;
  static constexpr int kHeadDim = kHeadDim_, kGroups = kGroups_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr Overlap kOverlap = kOverlap_;
  static constexpr bool kTurns = kOverlap == Overlap::kInTurn;
  static constexpr int kBlocksPerSM = kBlocksPerSM_;
  static constexpr int kRowStages = 2;
  // Whether offsets are looked at again only when sums run over, for which the way back takes registers; else every block.
  static constexpr bool kWatchesSums = Registers<kGroups, kBlocksPerSM>::kCompute >= 128;

  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kNumThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kGroupPanelBytes = kGroupRows * kPanelRowBytes;  // 64 rows of one panel
  static constexpr int kBlockPanelBytes = kBlockN * kPanelRowBytes;

  struct Shared {
    alignas(1024) uint8_t q[kRowStages][kGroups][kPanels][kGroupPanelBytes];  // later the rows of the output
    alignas(1024) uint8_t k[kStages][kPanels][kBlockPanelBytes];
    alignas(1024) uint8_t v[kStages][kPanels][kBlockPanelBytes];
    Barrier q_full[kRowStages], q_empty[kRowStages];
    Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    JobSlot<kGroups> slot[kRowStages];
    float bound[kRowStages];  // of the job's logits
  };
};

template <class Tile>
__device__ __forceinline__ void fetch_forward(const HopperForwardParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kRowStages> rows;
  RingPosition<Tile::kStages> ring;
  const bool leader = threadIdx.x % 32 == 0;
  for (int item = blockIdx.x;; rows.advance()) {
    barrier_wait(shared.q_empty[rows.stage], rows.parity ^ 1);
    auto& slot = shared.slot[rows.stage];
    if (!fetch_job(slot, params.work, item)) {
      if (leader) barrier_arrive(shared.q_full[rows.stage]);
      leave_queue(params.work);
      return;
    }
    const int next_item = request_item(params.work);
    const int head = slot.head % params.work.num_heads, batch = slot.head / params.work.num_heads;
    const int column_begin = slot.job[COLUMN_BEGIN], num_blocks = slot.job[NUM_BLOCKS];
    if (leader) {
      shared.bound[rows.stage] = params.head_bounds == nullptr ? params.logit_bound : params.head_bounds[head];
      barrier_arrive_expecting(shared.q_full[rows.stage], Tile::kGroups * Tile::kPanels * Tile::kGroupPanelBytes);
#pragma unroll
      for (int group = 0; group < Tile::kGroups; ++group) {
        load_panels<Tile::kPanels>(shared.q[rows.stage][group], params.q, shared.q_full[rows.stage],
                                   group_row_begin(slot, group), head, batch);
      }
      for (int block = 0; block < num_blocks; ++block, ring.advance()) {
        const int row = column_begin + block * Tile::kBlockN;
        barrier_wait(shared.k_empty[ring.stage], ring.parity ^ 1);
        barrier_arrive_expecting(shared.k_full[ring.stage], Tile::kPanels * Tile::kBlockPanelBytes);
        load_panels<Tile::kPanels>(shared.k[ring.stage], params.k, shared.k_full[ring.stage], row, head, batch);
        barrier_wait(shared.v_empty[ring.stage], ring.parity ^ 1);
        barrier_arrive_expecting(shared.v_full[ring.stage], Tile::kPanels * Tile::kBlockPanelBytes);
        load_panels<Tile::kPanels>(shared.v[ring.stage], params.v, shared.v_full[ring.stage], row, head, batch);
      }
    }
    __syncwarp();
    item = receive_item(next_item);
  }
}

// What a warpgroup knows while it works on a job.
template <class Tile>
struct ForwardRows {
  static constexpr int kLogits = Tile::kBlockN / 2;  // registers
  static constexpr int kSteps = Tile::kBlockN / 16;
  // A row's offset is the largest logit of the first block of which it sees a key, and stays, as sums and products lose
  // nothing while they grow, until a thread's sum of a block's probabilities (where sums are watched) or the largest probability
  // is above one of these: then it follows that block.
  static constexpr float kLargestSum = Tile::kType == DType::kFloat16 ? 0x1p12f : 0x1p60f;
  static constexpr float kLargestLog2 = 8.0f;

  float o[Tile::kHeadDim / 2];
  float row_sum[2], offset[2];  // log2 units; the sums are of this thread's columns only
  RowIntervals intervals;
  float scale_log2;

  // Rows that are not the group's have no need of an offset.
  __device__ __forceinline__ void start(int first_row, int num_rows) {
    set_zero(o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum[half] = 0.0f;
      offset[half] = first_row + 8 * half < num_rows ? -INFINITY : 0.0f;
    }
  }

  // The largest logit of a row in s.
  __device__ __forceinline__ float largest(const float (&s)[kLogits], int half) const {
    float x = fmaxf(s[2 * half], s[2 * half + 1]);
#pragma unroll
    for (int n = 1; n < kLogits / 4; ++n) x = fmaxf(x, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2)) * scale_log2;
  }

  // A row's new offset. Returns by which factor what was summed before must be multiplied.
  __device__ __forceinline__ float set_offset(int half, float x) {
    const float factor = offset[half] == -INFINITY ? 1.0f : exp2_approx(offset[half] - x);
    offset[half] = x;
    return factor;
  }

  // s = exp2(scale_log2 s - offset) of one row; returns their sum.
  template <bool kBounded>
  __device__ __forceinline__ float exponentiate(float (&s)[kLogits], int half) const {
    const float minus = kBounded || offset[half] == -INFINITY ? 0.0f : -offset[half];
    float sum[2] = {};
#pragma unroll
    for (int n = 0; n < kLogits / 4; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[4 * n + 2 * half + c];
        x = exp2_approx(kBounded ? x * scale_log2 : fmaf(x, scale_log2, minus));
        sum[c] += x;
      }
    }
    return sum[0] + sum[1];
  }

  // The logits of the rows marked once more, after their exponentials ran over: by this warp alone, from shared memory.
  __device__ __forceinline__ void compute_again(float (&s)[kLogits], const bool (&marked)[2], const uint8_t* q,
                                                const uint8_t* k) const {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x % kGroupThreads / 32 * 16;
    const uint32_t q_lane = shared_address(q) + swizzled_chunk(first_row + lane % 16, lane / 16);
    const uint32_t k_lane = shared_address(k) + swizzled_chunk(lane % 8, lane / 8);
#pragma unroll
    for (int n = 0; n < kLogits / 4; ++n) {
      float logits[4] = {};
#pragma unroll
      for (int step = 0; step < Tile::kHeadDim / 16; step += 2) {
        const int panel = step / 4, bytes = step % 4 * 32;  // in a row, where chunks are exchanged by exclusive or
        uint32_t a[4], b[4];
        ldmatrix_x4(b, (k_lane ^ bytes) + panel * Tile::kBlockPanelBytes + n * 8 * kPanelRowBytes);
        ldmatrix_x4(a, (q_lane ^ bytes) + panel * Tile::kGroupPanelBytes);
        mma_m16n8k16<Tile::kType>(logits, a, b[0], b[1]);
        ldmatrix_x4(a, (q_lane ^ (bytes + 32)) + panel * Tile::kGroupPanelBytes);
        mma_m16n8k16<Tile::kType>(logits, a, b[2], b[3]);
        // The compiler and the assembler shall not load all before anything is multiplied: for that there are no registers.
        for (float& logit : logits) pin(logit);
        __threadfence_block();
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& x = s[4 * n + c];
        x = marked[c / 2] ? logits[c] : x;
        pin(x);
      }
    }
  }

  // The step from logits to probabilities: s = exp2(scale_log2 s - offset), and sums of rows. Returns by which factor what was
  // multiplied with v before must be multiplied. q, k: whose product s is; first_column: of the block; masked: whether its
  // columns are not seen by all rows.
  template <bool kBounded>
  __device__ __forceinline__ void advance(float (&s)[kLogits], float (&factor)[2], const uint8_t* q, const uint8_t* k,
                                          int first_column, bool masked) {
    // NOTE: each row decides for itself, so that its bits do not depend on its neighbours in the tile.
    factor[0] = factor[1] = 1.0f;
    if (masked) intervals.apply(s, first_column);
    if constexpr (!kBounded) {
      const bool first = offset[0] == -INFINITY || offset[1] == -INFINITY;
      if (!Tile::kWatchesSums || __any_sync(0xffffffffu, first)) {
        const float x[2] = {largest(s, 0), largest(s, 1)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float above = Tile::kWatchesSums && offset[half] != -INFINITY ? INFINITY : offset[half] + kLargestLog2;
          if (x[half] > above) factor[half] = set_offset(half, x[half]);
        }
      }
    }
    float sum[2] = {exponentiate<kBounded>(s, 0), exponentiate<kBounded>(s, 1)};
    if constexpr (!kBounded && Tile::kWatchesSums) {
      bool over[2] = {!(sum[0] <= kLargestSum), !(sum[1] <= kLargestSum)};
      if (__any_sync(0xffffffffu, over[0] || over[1])) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned lanes = __ballot_sync(0xffffffffu, over[half]);
          over[half] = (lanes >> (threadIdx.x % 32 / 4 * 4) & 0xf) != 0;
        }
        compute_again(s, over, q, k);
        if (masked) intervals.apply(s, first_column, over);
        const float x[2] = {largest(s, 0), largest(s, 1)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (over[half]) {
            factor[half] = set_offset(half, x[half]);
            sum[half] = exponentiate<false>(s, half);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sum[half] = row_sum[half] * factor[half] + sum[half];
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Tile::kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[4 * n + c] *= factor[c / 2];
      }
    }
  }
};

template <class Tile, bool kBounded>
__device__ __forceinline__ void attend(ForwardRows<Tile>& rows, const GroupJob& job, typename Tile::Shared& shared,
                                       const uint8_t* q, RingPosition<Tile::kStages>& ring) {
  float s[Tile::kBlockN / 2];
  uint32_t p[Tile::kBlockN / 16][4];
  float factor[2];
  const auto issue_logits = [&] {
    barrier_wait(shared.k_full[ring.stage], ring.parity);
    issue_rows_product<Tile::kType, Tile::kHeadDim>(s, q, shared.k[ring.stage][0]);
  };
  const auto exponentiate = [&](int block) {
    rows.template advance<kBounded>(s, factor, q, shared.k[ring.stage][0], job.column_begin + block * Tile::kBlockN,
                                    job.masked(block));
    release(shared.k_empty[ring.stage]);
  };
  // One turn a block for every warpgroup, skipped blocks too.
  const auto take_turn = [&] {
    if constexpr (Tile::kTurns) turn_wait<Tile::kGroups>(threadIdx.x / kGroupThreads);
  };
  const auto pass_turn = [&] {
    if constexpr (Tile::kTurns) turn_pass<Tile::kGroups>(threadIdx.x / kGroupThreads);
  };
  if constexpr (Tile::kOverlap == Overlap::kNone) {
    for (int block = job.block_begin; block < job.block_end; ++block, ring.advance()) {
      issue_logits();
      wgmma_wait<0>();
      exponentiate(block);
      if constexpr (!kBounded) rows.rescale(factor);
      pack_operands<Tile::kType>(p, s);
      barrier_wait(shared.v_full[ring.stage], ring.parity);
      issue_columns_product<Tile::kType>(rows.o, p, shared.v[ring.stage][0]);
      wgmma_wait<0>();
      release(shared.v_empty[ring.stage]);
    }
  } else {
    if (job.block_begin >= job.block_end) return;
    take_turn();
    issue_logits();
    pass_turn();
    wgmma_wait<0>();
    exponentiate(job.block_begin);  // the accumulator is zero: nothing to rescale
    pack_operands<Tile::kType>(p, s);
    RingPosition<Tile::kStages> last = ring;
    ring.advance();
    for (int block = job.block_begin + 1; block < job.block_end; ++block, last = ring, ring.advance()) {
      take_turn();
      issue_logits();
      barrier_wait(shared.v_full[last.stage], last.parity);
      issue_columns_product<Tile::kType>(rows.o, p, shared.v[last.stage][0]);
      pass_turn();
      wgmma_wait<1>();
      exponentiate(block);
      wgmma_wait<0>();  // to which ptxas may come before it exponentiates: at head dim 64 faster than after it (see `finish`)
      release(shared.v_empty[last.stage]);
      if constexpr (!kBounded) rows.rescale(factor);
      pack_operands<Tile::kType>(p, s);
    }
    barrier_wait(shared.v_full[last.stage], last.parity);
    issue_columns_product<Tile::kType>(rows.o, p, shared.v[last.stage][0]);
    wgmma_wait<0>();
    release(shared.v_empty[last.stage]);
  }
}

template <class Tile>
__device__ __forceinline__ void compute_forward(const HopperForwardParams& params, typename Tile::Shared& shared) {
  constexpr int kWarpRows = 16;
  const int group = uniform(threadIdx.x / kGroupThreads), lane = threadIdx.x % 32;
  const int first_row = threadIdx.x % kGroupThreads / 32 * kWarpRows + lane / 4;
  RingPosition<Tile::kRowStages> row_ring;
  RingPosition<Tile::kStages> ring;
  ForwardRows<Tile> rows;
  rows.scale_log2 = params.work.scale * kLog2E;
  if constexpr (Tile::kTurns) {
    if (group == Tile::kGroups - 1) turn_pass<Tile::kGroups>(group);
  }
  const auto skip = [&](int num_blocks) {
    for (int i = 0; i < num_blocks; ++i, ring.advance()) {
      if constexpr (Tile::kTurns) {
        turn_wait<Tile::kGroups>(group);
        turn_pass<Tile::kGroups>(group);
      }
      barrier_wait(shared.k_full[ring.stage], ring.parity);
      release(shared.k_empty[ring.stage]);
      barrier_wait(shared.v_full[ring.stage], ring.parity);
      release(shared.v_empty[ring.stage]);
    }
  };

  for (;; row_ring.advance()) {
    barrier_wait(shared.q_full[row_ring.stage], row_ring.parity);
    const auto& slot = shared.slot[row_ring.stage];
    const int batch_head = uniform(slot.head);
    if (batch_head < 0) return;
    const GroupJob job(slot, group);
    uint8_t* q = shared.q[row_ring.stage][group][0];
    rows.start(first_row, job.num_rows);
    rows.intervals.load(params.work, job, first_row);
    // Rows of few keys, of which one may outweigh the others, keep the offset: their largest probability is exact then,
    // where bfloat16 would round it, and so are gradients that cancel.
    const bool bounded = Tile::kType == DType::kBFloat16 && job.full_begin < job.full_end &&
                         shared.bound[row_ring.stage] * kLog2E <= kBoundedLog2;
    skip(job.block_begin);
    if (bounded) {
      attend<Tile, true>(rows, job, shared, q, ring);
    } else {
      attend<Tile, false>(rows, job, shared, q, ring);
    }
    skip(job.num_blocks - job.block_end);

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.row_sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = first_row + 8 * half;
      if (lane % 4 == 0 && row < job.num_rows) {
        const float offset = bounded ? 0.0f : rows.offset[half];
        params.lse_log2[static_cast<int64_t>(batch_head) * params.work.num_queries + job.row_begin + row] =
            sum == 0.0f ? INFINITY : offset + log2f(sum);
      }
    }
    // The output takes the place of the group's queries, which no product reads any more.
    group_sync(group);
    store_rows<Tile::kType>(rows.o, inverse, q, Tile::kGroupPanelBytes,
                            rows_of(params.out, params.out_strides, params.work, batch_head, job.row_begin),
                            params.out_strides.row, job.num_rows);
    fence_async_proxy();
    release(shared.q_empty[row_ring.stage]);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kBlocksPerSM)
    hopper_forward_kernel(const __grid_constant__ HopperForwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;
    barriers_init(shared.q_full, 1), barriers_init(shared.q_empty, kWarps);
    barriers_init(shared.k_full, 1), barriers_init(shared.k_empty, kWarps);
    barriers_init(shared.v_full, 1), barriers_init(shared.v_empty, kWarps);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Tile::kGroups * kGroupThreads) {
    give_registers<Registers<Tile::kGroups, Tile::kBlocksPerSM>::kFetch>();
    if (threadIdx.x < Tile::kGroups * kGroupThreads + 32) fetch_forward<Tile>(params, shared);
  } else {
    take_registers<Registers<Tile::kGroups, Tile::kBlocksPerSM>::kCompute>();
    compute_forward<Tile>(params, shared);
  }
}

}  // namespace hmar
