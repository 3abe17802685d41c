// Block-sparse attention backward for sm_90a, second pass: dk and dv.
//
//   p_ij = exp(scale q_i . k_j - lse[i]);   dv[j] = sum_i p_ij do_i
//   ds_ij = p_ij (do_i . v_j - delta[i]);   dk[j] = scale sum_i ds_ij q_i
//
// A warpgroup owns 64 keys, whose logits it computes transposed, so that probabilities leave one product's accumulator as
// the next one's operand. Queries, do and their statistics come block by block. No atomics: bit-equal from run to run.
// The next block's logits are computed as soon as ds has left the registers they share, so that the matrix units always have
// products in store: dk and dp while a block is exponentiated, dv while its ds is formed.
// Read next: hopper_backward.cuh.
#pragma once

#include "hopper_tile.cuh"

namespace hmar {

template <DType kType_, int kHeadDim_, int kGroups_, int kBlockN_, int kStages_, int kRowStages_, int kBlocksPerSM_>
struct HopperDkdvTile : BackwardTile<kType_, kHeadDim_, kGroups_, kBlockN_, kStages_, kRowStages_, kBlocksPerSM_> {
  using Numbers = BackwardTile<kType_, kHeadDim_, kGroups_, kBlockN_, kStages_, kRowStages_, kBlocksPerSM_>;
  using Numbers::kGroups, Numbers::kStages, Numbers::kRowStages, Numbers::kPanels, Numbers::kBlockN;
  using Numbers::kGroupPanelBytes, Numbers::kBlockPanelBytes;

  struct Shared {
    alignas(1024) uint8_t k[kRowStages][kGroups][kPanels][kGroupPanelBytes];  // later the rows of dk
    alignas(1024) uint8_t v[kRowStages][kGroups][kPanels][kGroupPanelBytes];  // later the rows of dv
    alignas(1024) uint8_t q[kStages][kPanels][kBlockPanelBytes];
    alignas(1024) uint8_t d_out[kStages][kPanels][kBlockPanelBytes];
    alignas(16) RowStatistics statistics[kStages][kBlockN];
    Barrier rows_full[kRowStages], rows_empty[kRowStages];
    Barrier q_full[kStages], d_out_full[kStages], empty[kStages];
    JobSlot<kGroups> slot[kRowStages];
  };
};

// The keys and values of a job, whose slot is written.
template <class Tile, class Params>
__device__ __forceinline__ void load_keys(const Params& params, typename Tile::Shared& shared, int stage, int head,
                                          int batch) {
  Barrier& full = shared.rows_full[stage];
  barrier_arrive_expecting(full, 2 * Tile::kGroups * Tile::kPanels * Tile::kGroupPanelBytes);
#pragma unroll
  for (int group = 0; group < Tile::kGroups; ++group) {
    const int row = group_row_begin(shared.slot[stage], group);
    load_panels<Tile::kPanels>(shared.k[stage][group], params.k, full, row, head, batch);
    load_panels<Tile::kPanels>(shared.v[stage][group], params.v, full, row, head, batch);
  }
}

template <class Tile>
__device__ __forceinline__ void fetch_dkdv(const HopperDkdvParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kRowStages> rows;
  RingPosition<Tile::kStages> ring;
  const int lane = threadIdx.x % 32;
  for (int item = blockIdx.x;; rows.advance()) {
    barrier_wait(shared.rows_empty[rows.stage], rows.parity ^ 1);
    auto& slot = shared.slot[rows.stage];
    if (!fetch_job(slot, params.work, item)) {
      if (lane == 0) barrier_arrive(shared.rows_full[rows.stage]);
      leave_queue(params.work);
      return;
    }
    const int next_item = request_item(params.work);
    const int batch_head = slot.head;
    const int head = batch_head % params.work.num_heads, batch = batch_head / params.work.num_heads;
    if (lane == 0) load_keys<Tile>(params, shared, rows.stage, head, batch);
    const int64_t first_query = static_cast<int64_t>(batch_head) * params.work.num_queries;
    const int num_blocks = slot.job[NUM_BLOCKS];
    for (int block = 0, row = slot.job[COLUMN_BEGIN]; block < num_blocks; ++block, ring.advance(), row += Tile::kBlockN) {
      barrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      if (lane == 0) {
        barrier_arrive_expecting(shared.q_full[ring.stage], Tile::kPanels * Tile::kBlockPanelBytes);
        load_panels<Tile::kPanels>(shared.q[ring.stage], params.q, shared.q_full[ring.stage], row, head, batch);
        barrier_arrive_expecting(shared.d_out_full[ring.stage], Tile::kPanels * Tile::kBlockPanelBytes);
        load_panels<Tile::kPanels>(shared.d_out[ring.stage], params.d_out, shared.d_out_full[ring.stage], row, head, batch);
      }
#pragma unroll
      for (int i = 0; i < Tile::kBlockN; i += 32) {
        const int query = row + i + lane;
        const bool valid = query < params.work.num_queries;
        const int64_t index = first_query + (valid ? query : 0);
        RowStatistics& statistics = shared.statistics[ring.stage][i + lane];
        cp_async_4(shared_address(&statistics.lse_log2), params.lse_log2 + index, valid);
        cp_async_4(shared_address(&statistics.delta), params.delta + index, valid);
      }
      barrier_arrive_after_cp_async(shared.q_full[ring.stage]);
      __syncwarp();
    }
    item = receive_item(next_item);
  }
}

// A warpgroup's part of a job: 64 keys.
template <class Tile>
struct DkdvRows {
  static constexpr int kLogits = Tile::kBlockN / 2;  // registers
  static constexpr int kSteps = Tile::kBlockN / 16;

  float dk[Tile::kHeadDim / 2], dv[Tile::kHeadDim / 2];
  uint32_t p[kSteps][4], ds[kSteps][4];
  float dp[kLogits];

  // s = exp2(scale_log2 s - lse), rounded into p. `statistics`: of the block, from this thread's first column on.
  __device__ __forceinline__ void exponentiate(float (&s)[kLogits], const float4* statistics, float scale_log2) {
#pragma unroll
    for (int n = 0; n < kLogits / 4; ++n) {
      const float4 two = statistics[4 * n];  // neighbouring queries: lse, delta, lse, delta
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) s[i] = exp2_approx(fmaf(s[i], scale_log2, -(i % 2 == 0 ? two.x : two.z)));
    }
    pack_operands<Tile::kType>(p, s);
  }

  // ds = p (dp - delta), rounded.
  __device__ __forceinline__ void differentiate(float (&s)[kLogits], const float4* statistics) {
#pragma unroll
    for (int n = 0; n < kLogits / 4; ++n) {
      const float4 two = statistics[4 * n];
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) s[i] *= dp[i] - (i % 2 == 0 ? two.y : two.w);
    }
    pack_operands<Tile::kType>(ds, s);
  }
};

template <class Tile>
__device__ __forceinline__ void accumulate_dkdv(DkdvRows<Tile>& rows, const HopperWork& work, const GroupJob& job,
                                                typename Tile::Shared& shared, const uint8_t* k, const uint8_t* v,
                                                RingPosition<Tile::kStages>& ring) {
  constexpr int kLogits = Tile::kBlockN / 2, kHeadDim = Tile::kHeadDim;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x % kGroupThreads / 32 * 16 + lane / 4;
  const float scale_log2 = work.scale * kLog2E;
  const auto statistics = [&](int stage) {
    return reinterpret_cast<const float4*>(shared.statistics[stage]) + lane % 4;
  };

  set_zero(rows.dk), set_zero(rows.dv);
  if (job.block_begin >= job.block_end) return;
  float s[kLogits];
  const auto mask = [&](int block) {
    if (job.masked(block)) mask_keys(s, work, job.column_begin + block * Tile::kBlockN, job.row_begin + first_row);
  };
  const auto issue_logits = [&](const RingPosition<Tile::kStages>& at) {
    barrier_wait(shared.q_full[at.stage], at.parity);
    issue_rows_product<Tile::kType, kHeadDim>(s, k, shared.q[at.stage][0]);
  };
  const auto issue_dp = [&](const RingPosition<Tile::kStages>& at) {
    barrier_wait(shared.d_out_full[at.stage], at.parity);
    issue_rows_product<Tile::kType, kHeadDim>(rows.dp, v, shared.d_out[at.stage][0]);
  };
  if constexpr (kHeadDim == 64) {
    // In the order they are issued: s(0), dp(0), then for each block b: dv(b), s(b + 1), dk(b), dp(b + 1).
    issue_logits(ring);
    issue_dp(ring);
    wgmma_wait<1>();
    for (int block = job.block_begin;; ++block) {
      mask(block);
      rows.exponentiate(s, statistics(ring.stage), scale_log2);
      issue_columns_product<Tile::kType>(rows.dv, rows.p, shared.d_out[ring.stage][0]);
      wgmma_wait<1>();  // dp(block), and before it dk(block - 1)
      if (block > job.block_begin) release(shared.empty[ring.last_stage()]);
      rows.differentiate(s, statistics(ring.stage));
      const int stage = ring.stage;
      ring.advance();
      if (block + 1 == job.block_end) {
        issue_columns_product<Tile::kType>(rows.dk, rows.ds, shared.q[stage][0]);
        break;
      }
      issue_logits(ring);
      issue_columns_product<Tile::kType>(rows.dk, rows.ds, shared.q[stage][0]);
      issue_dp(ring);
      wgmma_wait<2>();  // s(block + 1), and before it dv(block)
    }
  } else {
    // Registers do not suffice for the next block's logits beside this one's operands.
    for (int block = job.block_begin;; ++block) {
      issue_logits(ring);
      issue_dp(ring);
      wgmma_wait<1>();
      mask(block);
      rows.exponentiate(s, statistics(ring.stage), scale_log2);
      issue_columns_product<Tile::kType>(rows.dv, rows.p, shared.d_out[ring.stage][0]);
      wgmma_wait<1>();
      rows.differentiate(s, statistics(ring.stage));
      issue_columns_product<Tile::kType>(rows.dk, rows.ds, shared.q[ring.stage][0]);
      const int stage = ring.stage;
      ring.advance();
      if (block + 1 == job.block_end) break;
      wgmma_wait<0>();
      release(shared.empty[stage]);
    }
  }
  wgmma_wait<0>();
  release(shared.empty[ring.last_stage()]);
}

template <class Tile>
__device__ __forceinline__ void compute_dkdv(const HopperDkdvParams& params, typename Tile::Shared& shared) {
  const int group = uniform(threadIdx.x / kGroupThreads);
  RingPosition<Tile::kRowStages> row_ring;
  RingPosition<Tile::kStages> ring;
  const auto skip = [&](int num_blocks) {
    for (int i = 0; i < num_blocks; ++i, ring.advance()) {
      barrier_wait(shared.q_full[ring.stage], ring.parity);
      barrier_wait(shared.d_out_full[ring.stage], ring.parity);
      release(shared.empty[ring.stage]);
    }
  };

  for (;; row_ring.advance()) {
    barrier_wait(shared.rows_full[row_ring.stage], row_ring.parity);
    const auto& slot = shared.slot[row_ring.stage];
    const int batch_head = uniform(slot.head);
    if (batch_head < 0) return;
    const GroupJob job(slot, group);
    uint8_t* k = shared.k[row_ring.stage][group][0];
    uint8_t* v = shared.v[row_ring.stage][group][0];
    DkdvRows<Tile> rows;
    skip(job.block_begin);
    accumulate_dkdv(rows, params.work, job, shared, k, v, ring);
    skip(job.num_blocks - job.block_end);

    group_sync(group);
    const float dk_factor[2] = {params.work.scale, params.work.scale}, dv_factor[2] = {1.0f, 1.0f};
    store_rows<Tile::kType>(rows.dk, dk_factor, k, Tile::kGroupPanelBytes,
                            rows_of(params.dk, params.dk_strides, params.work, batch_head, job.row_begin),
                            params.dk_strides.row, job.num_rows);
    store_rows<Tile::kType>(rows.dv, dv_factor, v, Tile::kGroupPanelBytes,
                            rows_of(params.dv, params.dv_strides, params.work, batch_head, job.row_begin),
                            params.dv_strides.row, job.num_rows);
    fence_async_proxy();
    release(shared.rows_empty[row_ring.stage]);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kBlocksPerSM)
    hopper_dkdv_kernel(const __grid_constant__ HopperDkdvParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups;
    barriers_init(shared.rows_full, 1), barriers_init(shared.rows_empty, kWarps);
    barriers_init(shared.q_full, 1 + 32);  // the copy engine's arrival, and every lane's for the statistics
    barriers_init(shared.d_out_full, 1), barriers_init(shared.empty, kWarps);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Tile::kGroups * kGroupThreads) {
    give_registers<Registers<Tile::kGroups, Tile::kBlocksPerSM>::kFetch>();
    if (threadIdx.x < Tile::kGroups * kGroupThreads + 32) fetch_dkdv<Tile>(params, shared);
  } else {
    take_registers<Registers<Tile::kGroups, Tile::kBlocksPerSM>::kCompute>();
    compute_dkdv<Tile>(params, shared);
  }
}

}  // namespace hmar
