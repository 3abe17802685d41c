// Block-sparse attention backward for sm_90a, first pass: dq, and what the second pass needs of every query.
//
//   delta[i] = sum_d out_id do_id - dlse[i];   p_ij = exp(scale q_i . k_j - lse[i])
//   ds_ij = p_ij (do_i . v_j - delta[i]);      dq[i] = scale sum_j ds_ij k_j
//
// Built as the forward is: a warpgroup owns 64 queries and sees keys block by block; no atomics, so the result is bit-equal
// from run to run. Of products the matrix units have some in store: do v^T while a block is exponentiated, and the one with k
// while the next block's logits and do v^T are computed, or, at head dim 128, while it is exponentiated.
// Read next: hopper_backward_dkdv.cuh.
#pragma once

#include "hopper_tile.cuh"

namespace hmar {

template <DType kType_, int kHeadDim_, int kGroups_, int kBlockN_, int kStages_, int kRowStages_, int kBlocksPerSM_>
struct HopperDqTile : BackwardTile<kType_, kHeadDim_, kGroups_, kBlockN_, kStages_, kRowStages_, kBlocksPerSM_> {
  using Numbers = BackwardTile<kType_, kHeadDim_, kGroups_, kBlockN_, kStages_, kRowStages_, kBlocksPerSM_>;
  using Numbers::kGroups, Numbers::kStages, Numbers::kRowStages, Numbers::kPanels, Numbers::kBlockN;
  using Numbers::kGroupPanelBytes, Numbers::kBlockPanelBytes;
  // Whether the next block's logits are issued before this one's product with k. What is faster on an H100 (reports/log.md).
  static constexpr bool kLogitsFirst = kHeadDim_ == 128;

  struct Shared {
    alignas(1024) uint8_t q[kRowStages][kGroups][kPanels][kGroupPanelBytes];  // later the rows of dq
    alignas(1024) uint8_t d_out[kRowStages][kGroups][kPanels][kGroupPanelBytes];
    alignas(1024) uint8_t out[kRowStages][kGroups][kPanels][kGroupPanelBytes];
    alignas(1024) uint8_t k[kStages][kPanels][kBlockPanelBytes];
    alignas(1024) uint8_t v[kStages][kPanels][kBlockPanelBytes];
    float lse_log2[kRowStages][kGroups][kGroupRows], d_lse_log2[kRowStages][kGroups][kGroupRows];
    RowStatistics statistics[kGroups][kGroupRows];
    Barrier rows_full[kRowStages], rows_empty[kRowStages];
    Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    JobSlot<kGroups> slot[kRowStages];
  };
};

template <class Tile>
__device__ __forceinline__ void fetch_dq(const HopperDqParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kRowStages> rows;
  RingPosition<Tile::kStages> ring;
  const bool leader = threadIdx.x % 32 == 0;
  for (int item = blockIdx.x;; rows.advance()) {
    barrier_wait(shared.rows_empty[rows.stage], rows.parity ^ 1);
    auto& slot = shared.slot[rows.stage];
    Barrier& full = shared.rows_full[rows.stage];
    if (!fetch_job(slot, params.work, item)) {
      if (leader) barrier_arrive(full);
      barrier_arrive(full);
      leave_queue(params.work);
      return;
    }
    const int next_item = request_item(params.work);
    const int batch_head = slot.head;
    const int head = batch_head % params.work.num_heads, batch = batch_head / params.work.num_heads;
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      const GroupJob job(slot, group);
      const int64_t first_query = static_cast<int64_t>(batch_head) * params.work.num_queries + job.row_begin;
#pragma unroll
      for (int row = threadIdx.x % 32; row < kGroupRows; row += 32) {
        const bool valid = row < job.num_rows;
        const int64_t query = first_query + (valid ? row : 0);
        cp_async_4(shared_address(&shared.lse_log2[rows.stage][group][row]), params.lse_log2 + query, valid);
        if (params.d_lse_log2 != nullptr) {
          cp_async_4(shared_address(&shared.d_lse_log2[rows.stage][group][row]), params.d_lse_log2 + query, valid);
        }
      }
    }
    barrier_arrive_after_cp_async(full);
    if (leader) {
      barrier_arrive_expecting(full, 3 * Tile::kGroups * Tile::kPanels * Tile::kGroupPanelBytes);
#pragma unroll
      for (int group = 0; group < Tile::kGroups; ++group) {
        const int row = group_row_begin(slot, group);
        load_panels<Tile::kPanels>(shared.q[rows.stage][group], params.q, full, row, head, batch);
        load_panels<Tile::kPanels>(shared.d_out[rows.stage][group], params.d_out, full, row, head, batch);
        load_panels<Tile::kPanels>(shared.out[rows.stage][group], params.out, full, row, head, batch);
      }
      for (int block = 0; block < slot.job[NUM_BLOCKS]; ++block, ring.advance()) {
        const int row = slot.job[COLUMN_BEGIN] + block * Tile::kBlockN;
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

// Sums out * do over the columns of this warp's rows; writes their statistics to shared memory, and to global memory if asked.
template <class Tile>
__device__ __forceinline__ void sum_rows(const HopperDqParams& params, typename Tile::Shared& shared, const GroupJob& job,
                                         int batch_head, int group, int stage) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x % kGroupThreads / 32 * 16;
  const int64_t first_query = static_cast<int64_t>(batch_head) * params.work.num_queries + job.row_begin;
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int row = first_row + 4 * pass + lane / 8;
    float sum = 0.0f;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const uint4 a = *reinterpret_cast<const uint4*>(shared.out[stage][group][panel] + swizzled_chunk(row, lane % 8));
      const uint4 b = *reinterpret_cast<const uint4*>(shared.d_out[stage][group][panel] + swizzled_chunk(row, lane % 8));
      sum += dot<Tile::kType>(a.x, b.x) + dot<Tile::kType>(a.y, b.y) + dot<Tile::kType>(a.z, b.z) +
             dot<Tile::kType>(a.w, b.w);
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane % 8 == 0) {
      RowStatistics row_statistics{INFINITY, 0.0f};
      if (row < job.num_rows) {
        const float d_lse = params.d_lse_log2 == nullptr ? 0.0f : shared.d_lse_log2[stage][group][row] * kLog2E;
        row_statistics = {shared.lse_log2[stage][group][row], sum - d_lse};
        if (params.delta != nullptr) params.delta[first_query + row] = row_statistics.delta;
      }
      shared.statistics[group][row] = row_statistics;
    }
  }
  __syncwarp();
}

// dq of a warpgroup's rows, not yet scaled, over the blocks that they see, of which there is one at least.
template <class Tile>
__device__ __forceinline__ void accumulate_dq(float (&dq)[Tile::kHeadDim / 2], const HopperWork& work, const GroupJob& job,
                                              const RowIntervals& intervals, const RowStatistics (&statistics)[2],
                                              typename Tile::Shared& shared, const uint8_t* q, const uint8_t* d_out,
                                              RingPosition<Tile::kStages>& ring) {
  constexpr int kLogits = Tile::kBlockN / 2;
  const float scale_log2 = work.scale * kLog2E;
  uint32_t ds[Tile::kBlockN / 16][4];
  float s[kLogits], dp[kLogits];
  const auto issue_logits = [&] {
    barrier_wait(shared.k_full[ring.stage], ring.parity);
    issue_rows_product<Tile::kType, Tile::kHeadDim>(s, q, shared.k[ring.stage][0]);
  };
  const auto issue_dp = [&] {
    barrier_wait(shared.v_full[ring.stage], ring.parity);
    issue_rows_product<Tile::kType, Tile::kHeadDim>(dp, d_out, shared.v[ring.stage][0]);
  };
  issue_logits();
  issue_dp();
  wgmma_wait<1>();
  for (int block = job.block_begin;; ++block) {
    if (job.masked(block)) intervals.apply(s, job.column_begin + block * Tile::kBlockN);
#pragma unroll
    for (int i = 0; i < kLogits; ++i) s[i] = exp2_approx(fmaf(s[i], scale_log2, -statistics[i / 2 % 2].lse_log2));
    finish(s);
    wgmma_wait<0>();  // dp(block), and before it dq(block - 1)
    if (block > job.block_begin) release(shared.k_empty[ring.last_stage()]);
    release(shared.v_empty[ring.stage]);
#pragma unroll
    for (int i = 0; i < kLogits; ++i) s[i] *= dp[i] - statistics[i / 2 % 2].delta;
    pack_operands<Tile::kType>(ds, s);
    const auto issue_dq = [&, stage = ring.stage] { issue_columns_product<Tile::kType>(dq, ds, shared.k[stage][0]); };
    ring.advance();
    if (block + 1 == job.block_end) {
      issue_dq();
      break;
    }
    if constexpr (!Tile::kLogitsFirst) issue_dq();
    issue_logits();
    if constexpr (Tile::kLogitsFirst) issue_dq();
    issue_dp();
    wgmma_wait<Tile::kLogitsFirst ? 2 : 1>();  // s(block + 1)
  }
  wgmma_wait<0>();
  release(shared.k_empty[ring.last_stage()]);
}

template <class Tile>
__device__ __forceinline__ void compute_dq(const HopperDqParams& params, typename Tile::Shared& shared) {
  const int group = uniform(threadIdx.x / kGroupThreads), lane = threadIdx.x % 32;
  const int first_row = threadIdx.x % kGroupThreads / 32 * 16 + lane / 4;
  RingPosition<Tile::kRowStages> row_ring;
  RingPosition<Tile::kStages> ring;
  const auto skip = [&](int num_blocks) {
    for (int i = 0; i < num_blocks; ++i, ring.advance()) {
      barrier_wait(shared.k_full[ring.stage], ring.parity);
      release(shared.k_empty[ring.stage]);
      barrier_wait(shared.v_full[ring.stage], ring.parity);
      release(shared.v_empty[ring.stage]);
    }
  };

  for (;; row_ring.advance()) {
    barrier_wait(shared.rows_full[row_ring.stage], row_ring.parity);
    const auto& slot = shared.slot[row_ring.stage];
    const int batch_head = uniform(slot.head);
    if (batch_head < 0) return;
    const GroupJob job(slot, group);
    uint8_t* q = shared.q[row_ring.stage][group][0];
    const uint8_t* d_out = shared.d_out[row_ring.stage][group][0];
    sum_rows<Tile>(params, shared, job, batch_head, group, row_ring.stage);
    const RowStatistics statistics[2] = {shared.statistics[group][first_row], shared.statistics[group][first_row + 8]};
    RowIntervals intervals;
    intervals.load(params.work, job, first_row);
    float dq[Tile::kHeadDim / 2];
    set_zero(dq);
    for (float& x : dq) pin(x);  // zero now, not between products that are under way, which ptxas would serialise (C7515)

    skip(job.block_begin);
    if (job.block_begin < job.block_end) {
      accumulate_dq<Tile>(dq, params.work, job, intervals, statistics, shared, q, d_out, ring);
    }
    skip(job.num_blocks - job.block_end);

    wait_for_previous();  // dq may be in use until then: launched with overlap, see hopper.h
    group_sync(group);
    const float factor[2] = {params.work.scale, params.work.scale};
    store_rows<Tile::kType>(dq, factor, q, Tile::kGroupPanelBytes,
                            rows_of(params.dq, params.dq_strides, params.work, batch_head, job.row_begin),
                            params.dq_strides.row, job.num_rows);
    fence_async_proxy();
    release(shared.rows_empty[row_ring.stage]);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kBlocksPerSM)
    hopper_dq_kernel(const __grid_constant__ HopperDqParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;
    barriers_init(shared.rows_full, 1 + 32), barriers_init(shared.rows_empty, kWarps);
    barriers_init(shared.k_full, 1), barriers_init(shared.k_empty, kWarps);
    barriers_init(shared.v_full, 1), barriers_init(shared.v_empty, kWarps);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Tile::kGroups * kGroupThreads) {
    give_registers<Registers<Tile::kGroups, Tile::kBlocksPerSM>::kFetch>();
    if (threadIdx.x < Tile::kGroups * kGroupThreads + 32) fetch_dq<Tile>(params, shared);
  } else {
    take_registers<Registers<Tile::kGroups, Tile::kBlocksPerSM>::kCompute>();
    compute_dq<Tile>(params, shared);
  }
}

}  // namespace hmar
