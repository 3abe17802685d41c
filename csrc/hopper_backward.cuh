// Block-sparse attention backward for sm_90a in one pass: dq, dk and dv from one computation of p and ds.
//
//   delta[i] = sum_d out_id do_id - dlse[i];   p_ij = exp(scale q_i . k_j - lse[i]);   ds_ij = p_ij (do_i . v_j - delta[i])
//   dv[j] = sum_i p_ij do_i;   dk[j] = scale sum_i ds_ij q_i;   dq[i] = scale sum_j ds_ij k_j
//
// The warpgroups own 64 keys each and compute logits transposed, as in hopper_backward_dkdv.cuh. Besides, ds goes through
// shared memory, where the block's 64 queries meet all its keys: their products with k are added to float32 sums in global
// memory in whatever order blocks come, so dq is not bit-equal from run to run (dk and dv are). Five products instead
// of the two passes' seven.
//
// The sums are those of a few heads at a time, which stay in the L2 cache. Half of a head's are where its dq will be, the
// others in one of num_slots slots, which heads take in turn. Warps that the fetching warp leaves idle work ahead and behind on
// chunks of queries: they round a finished head's sums into dq, then make the slot ready for the head that takes it over: sums of
// zero, and its statistics (lse, delta). At the beginning and at the end, where there is nothing to compute, all warps do.
// `ready` counts a head's chunks, `done` its jobs. Chunks and jobs are taken in order by whichever block runs: the first chunk
// that is not finished waits only for jobs of earlier heads, the first job only for chunks that wait for such, so no block has
// to be resident beside another.
// Slots are in gradients of the last num_last_heads heads, for which no dq is computed and nothing added: the last ones in their
// dq, which the dq pass writes afterwards, the others in their dk and dv, two a head. With N heads that have sums, head N + i
// has slots 2 i and 2 i + 1 there, and its jobs begin when heads N + 2 i and N + 2 i + 1, which take over these slots, are
// ready, whether there are such heads or not: then the sums are rounded.
// (Jobs of the last tail_heads heads alternate. So that none of them waits for one that comes later, they have slots of their
// own, and none has another one's slots in its gradients: tail_heads <= num_slots, 2 num_last_heads.)
// Read next: hopper.cu.
#pragma once

#include "hopper_backward_dkdv.cuh"

namespace hmar {

// Of half of a head's sums: an index in HopperBackwardParams::sums, head and batch.
struct SumsPlace {
  int32_t tensor, head, batch;
};

// What a warp that serves heads brings into shared memory, rows of 128 bytes: copies are under way together, where registers
// hold little. While it serves one chunk those of the next one take the place of what has been read.
struct Served {
  alignas(16) uint8_t sums[2][kChunkQueries * kPanelRowBytes];  // halves
  alignas(16) uint8_t out[kChunkQueries * kPanelRowBytes];
  alignas(16) uint8_t d_out[kChunkQueries * kPanelRowBytes];
};

template <bool kServesAhead>
struct ServedByWarps {
  Served of_warp[2];
};
template <>
struct ServedByWarps<false> {};

template <DType kType_, int kHeadDim_, int kGroups_, int kBlockN_, int kStages_, int kRowStages_, int kBlocksPerSM_>
struct HopperBackwardTile : BackwardTile<kType_, kHeadDim_, kGroups_, kBlockN_, kStages_, kRowStages_, kBlocksPerSM_> {
  using Numbers = BackwardTile<kType_, kHeadDim_, kGroups_, kBlockN_, kStages_, kRowStages_, kBlocksPerSM_>;
  using Numbers::kGroups, Numbers::kStages, Numbers::kRowStages, Numbers::kPanels, Numbers::kBlockN;
  using Numbers::kHeadDim, Numbers::kGroupPanelBytes, Numbers::kBlockPanelBytes;
  static_assert(kGroups == 2 && kBlockN == 64);
  // At head dim 64 a warpgroup of its own computes dq; at 128 each of the others computes 64 of its columns.
  static constexpr bool kDqGroup = kHeadDim_ == 64;
  static constexpr int kNumThreads = (kGroups + kDqGroup + 1) * kGroupThreads;
  static constexpr int kRegistersOfCompute = kDqGroup ? 192 : 232, kRegistersOfDq = 72,
                       kRegistersOfFetch = kDqGroup ? 56 : 40;
  static constexpr int kExchanges = kDqGroup ? 3 : 2;  // blocks whose ds is in shared memory
  static constexpr bool kServesAhead = kDqGroup;  // at head dim 128 there is no room
  static constexpr int kStagings = kDqGroup ? 1 : kGroups;
  // Where the keys and values of one job only have room, the next job's come in their place: its first blocks, up to kStages - 1,
  // then values, then keys, each as soon as it has been read for the last time. The slot of that job has been written by then,
  // while the two jobs before it may use theirs.
  static constexpr bool kNextInPlace = kRowStages == 1;
  static constexpr int kSlots = kNextInPlace ? 3 : kRowStages;
  static_assert(kDqGroup != kNextInPlace, "as the two loops have it");
  static constexpr int kHalfColumns = kHeadDim / 2;  // whose sums take as much memory as a row of dq
  static constexpr int kHalves = kPanelColumns / kHalfColumns;  // that a product of 64 columns has

  struct Shared {
    alignas(1024) uint8_t k[kRowStages][kGroups][kPanels][kGroupPanelBytes];
    alignas(1024) uint8_t v[kRowStages][kGroups][kPanels][kGroupPanelBytes];  // at head dim 64 later those of dv, dk
    alignas(1024) uint8_t q[kStages][kPanels][kBlockPanelBytes];
    alignas(1024) uint8_t d_out[kStages][kPanels][kBlockPanelBytes];
    alignas(1024) uint8_t ds[kExchanges][kGroups][kBlockPanelBytes];  // rows are queries, columns a group's keys
    // Float32, on the way to the sums; at head dim 128 rows of dv and dk, too.
    alignas(1024) uint8_t dq[kStagings][kGroupRows * kPanelColumns * 4];
    ServedByWarps<kServesAhead> served;
    alignas(16) RowStatistics statistics[kStages][kBlockN];
    SumsPlace sums[kSlots][2];  // where the halves of a head's sums are
    Barrier rows_full[kRowStages], rows_empty[kRowStages];
    Barrier rows_done[kSlots];  // NOTE: a warp may be done with a job before another one is with the job before
    Barrier values_empty;  // where the next job's come in place: rows_empty is for the keys then
    Barrier full[kStages], empty[kStages];
    Barrier ds_full[kExchanges], ds_empty[kExchanges];
    JobSlot<kGroups> slot[kSlots];
  };
};

// Returns once a counter in global memory has come to `count`; what was written before it was counted is visible then.
__device__ __forceinline__ void wait_for_count(const int32_t* counter, int count) {
  if (threadIdx.x % 32 == 0) {
    while (load_acquire(counter) < count) __nanosleep(500);
  }
  __syncwarp();
}

// Whether it has come to `count` already.
__device__ __forceinline__ bool has_come_to(const int32_t* counter, int count) {
  const bool come = receive_item(threadIdx.x % 32 == 0 ? load_acquire(counter) : 0) >= count;
  __syncwarp();
  return come;
}

// Counts what all lanes of the warp wrote, and what they saw written.
__device__ __forceinline__ void count_up(int32_t* counter) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) count_release(counter);
}

__device__ __forceinline__ bool has_sums(const HopperBackwardParams& params, int batch_head) {
  return batch_head < params.num_batch_heads - params.num_last_heads;
}

__device__ __forceinline__ int slot_of(const HopperBackwardParams& params, int batch_head) {
  return (batch_head + params.first_slot) % params.num_slots;
}

__device__ __forceinline__ RowStatistics* statistics_of(const HopperBackwardParams& params, int slot) {
  return params.statistics + static_cast<int64_t>(slot) * params.work.num_queries;
}

// Float32 sums of half of the columns. Eight of a row are a chunk, as a product's accumulator has them, two in each of four
// lanes; chunk c lies where chunk c ^ (row % chunks) would, so that neighbouring rows are in other banks of shared memory.
template <class Tile>
__device__ __forceinline__ int sums_chunk(int query, int chunk) {
  return chunk ^ (query & (Tile::kHalfColumns / 8 - 1));
}

// Slots in dk and dv, which are needed before the launch has ended.
__device__ __forceinline__ int num_early_slots(const HopperBackwardParams& params) {
  return params.num_slots - params.num_last_heads;
}

__device__ __forceinline__ SumsPlace sums_place(const HopperBackwardParams& params, const BatchHead& of, int slot, int half) {
  if (half == 0) return {IN_DQ, of.head, of.batch};
  const int first = params.work.num_heads - params.num_last_heads, in_dq = slot - num_early_slots(params);
  const int tensor = in_dq >= 0 ? IN_DQ : slot % 2 == 0 ? IN_DK : IN_DV;
  return {tensor, first + (in_dq >= 0 ? in_dq : slot / 2), params.num_batch_heads / params.work.num_heads - 1};
}

// A row of half of a head's sums, and the bytes to the next one.
struct SumsRow {
  uint8_t* at;
  int64_t stride;
};

__device__ __forceinline__ SumsRow sums_row(const HopperBackwardParams& params, const BatchHead& of, int slot, int half,
                                            int query) {
  const SumsPlace place = sums_place(params, of, slot, half);
  const int in = place.tensor;
  const Strides& strides = in == IN_DQ ? params.dq_strides : in == IN_DK ? params.dk_strides : params.dv_strides;
  void* tensor = in == IN_DQ ? params.dq : in == IN_DK ? params.dk : params.dv;
  const int64_t offset = place.batch * strides.batch + place.head * strides.head + query * strides.row;
  return {static_cast<uint8_t*>(tensor) + 2 * offset, 2 * strides.row};
}

// The keys and values of a job where those of the job before are.
template <class Tile>
__device__ __forceinline__ void load_keys_in_place(const HopperBackwardParams& params, typename Tile::Shared& shared,
                                                   const RingPosition<Tile::kRowStages>& rows,
                                                   const JobSlot<Tile::kGroups>& slot, const BatchHead& of) {
  const bool first_lane = threadIdx.x % 32 == 0;
  Barrier& full = shared.rows_full[0];
  const auto load = [&](decltype(shared.k)& tensor, const TensorMap& map) {
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      load_panels<Tile::kPanels>(tensor[0][group], map, full, group_row_begin(slot, group), of.head, of.batch);
    }
  };
  barrier_wait(shared.values_empty, rows.parity ^ 1);
  if (first_lane) {
    barrier_arrive_expecting(full, 2 * Tile::kGroups * Tile::kPanels * Tile::kGroupPanelBytes);
    load(shared.v, params.v);
  }
  barrier_wait(shared.rows_empty[0], rows.parity ^ 1);
  if (first_lane) load(shared.k, params.k);
}

template <class Tile>
__device__ __forceinline__ void fetch_backward(const HopperBackwardParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kRowStages> rows;
  RingPosition<Tile::kSlots> slots;
  RingPosition<Tile::kStages> ring;
  const int lane = threadIdx.x % 32;
  const auto take_item = [&] { return lane == 0 ? atomicAdd(params.work.next_item, 1) : 0; };
  for (int item = receive_item(take_item());; rows.advance(), slots.advance()) {
    if (!Tile::kNextInPlace) barrier_wait(shared.rows_empty[rows.stage], rows.parity ^ 1);
    auto& slot = shared.slot[slots.stage];
    if (!fetch_job(slot, params.work, item)) {
      if (Tile::kNextInPlace) barrier_wait(shared.rows_empty[rows.stage], rows.parity ^ 1);
      if (lane == 0) barrier_arrive(shared.rows_full[rows.stage]);
      return;
    }
    const int batch_head = slot.head;
    const BatchHead of = batch_and_head(params.work, batch_head);
    const int head = of.head, batch = of.batch, sums_slot = slot_of(params, batch_head);
    const int num_blocks = slot.job[NUM_BLOCKS];
    if (lane < 2) shared.sums[slots.stage][lane] = sums_place(params, of, sums_slot, lane);
    __syncwarp();
    const auto wait_until_ready = [&] {
      wait_for_count(&params.progress[batch_head].ready, params.num_chunks);
      if (has_sums(params, batch_head)) return;
      const int first = params.num_batch_heads - params.num_last_heads, slots_begin = 2 * (batch_head - first);
      for (int i = slots_begin; i < min(slots_begin + 2, num_early_slots(params)); ++i) {
        wait_for_count(&params.progress[first + i].ready, params.num_chunks);
      }
    };
    if (num_blocks == 0) wait_until_ready();  // the zeros of dk and dv, which may be slots
    const auto load_rows = [&] {
      if constexpr (Tile::kNextInPlace) {
        load_keys_in_place<Tile>(params, shared, rows, slot, of);
      } else {
        if (lane == 0) load_keys<Tile>(params, shared, rows.stage, head, batch);
      }
    };
    const int blocks_before_rows = Tile::kNextInPlace ? min(num_blocks, Tile::kStages - 1) : 0;
    if (blocks_before_rows == 0) load_rows();
    const RowStatistics* statistics = statistics_of(params, sums_slot);
    for (int block = 0; block < num_blocks; ++block, ring.advance()) {
      const int row = slot.job[COLUMN_BEGIN] + block * Tile::kBlockN;
      barrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      if (block == 0) {
        wait_until_ready();
        fence_async_proxy_global();
      }
      if (lane == 0) {
        barrier_arrive_expecting(shared.full[ring.stage], 2 * Tile::kPanels * Tile::kBlockPanelBytes);
        load_panels<Tile::kPanels>(shared.q[ring.stage], params.q, shared.full[ring.stage], row, head, batch);
        load_panels<Tile::kPanels>(shared.d_out[ring.stage], params.d_out, shared.full[ring.stage], row, head, batch);
      }
#pragma unroll
      for (int i = 0; i < Tile::kBlockN; i += 32) {
        const int query = row + i + lane;
        const bool valid = query < params.work.num_queries;
        cp_async_8(shared_address(&shared.statistics[ring.stage][i + lane]), statistics + (valid ? query : 0), valid);
      }
      barrier_arrive_after_cp_async(shared.full[ring.stage]);
      __syncwarp();
      if (block + 1 == blocks_before_rows) load_rows();
    }
    item = receive_item(take_item());  // not earlier: items that wait would hold back their heads
  }
}

// The warp that tells the others, on all SMs, which jobs are done: their sums are complete in global memory.
// Where rows come in place it arrives at what the next job's keys wait for, so that it never falls behind by two.
template <class Tile>
__device__ __forceinline__ void count_jobs(const HopperBackwardParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kSlots> slots;
  for (RingPosition<Tile::kRowStages> rows;; rows.advance(), slots.advance()) {
    barrier_wait(shared.rows_full[rows.stage], rows.parity);
    const int batch_head = shared.slot[slots.stage].head;
    if (batch_head < 0) return;
    if (Tile::kNextInPlace) release(shared.rows_empty[rows.stage]);
    barrier_wait(shared.rows_done[slots.stage], slots.parity);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      if (!Tile::kNextInPlace) barrier_arrive(shared.rows_empty[rows.stage]);
      __threadfence();
    }
    count_up(&params.progress[batch_head].done);
  }
}

// The queries whose sums and statistics a warp serves at a time, in the order of heads.
struct HeadChunk {
  int batch_head, query_begin;

  __device__ __forceinline__ int num_rows(const HopperWork& work) const {
    return min(work.num_queries - query_begin, kChunkQueries);
  }
  __device__ __forceinline__ BatchHead of(const HopperBackwardParams& params) const {
    return batch_and_head(params.work, batch_head);
  }
  __device__ __forceinline__ int slot(const HopperBackwardParams& params) const { return slot_of(params, batch_head); }
};

// The same with the results of three divisions kept, where there are registers for them.
struct PlacedChunk : HeadChunk {
  BatchHead place;
  int its_slot;

  __device__ __forceinline__ BatchHead of(const HopperBackwardParams&) const { return place; }
  __device__ __forceinline__ int slot(const HopperBackwardParams&) const { return its_slot; }
};

// Number `number`, counted from those of head first_head.
__device__ __forceinline__ HeadChunk head_chunk(const HopperBackwardParams& params, int number, int first_head) {
  const int head = number / params.num_chunks;
  return {head + first_head, (number - head * params.num_chunks) * kChunkQueries};
}

// Lanes that read or write a row of half of the columns, 16 bytes each, and rows that a warp has at a time.
template <class Tile>
constexpr int kLanesOfSums = Tile::kHalfColumns / 4;
template <class Tile>
constexpr int kRowsOfSums = 32 / kLanesOfSums<Tile>;
static_assert(kChunkQueries == 32, "a lane each");

// Eight lanes bring a row, 16 bytes each; `from`: row 0, stride: bytes to the next one.
__device__ __forceinline__ void bring_rows(uint8_t* to, const uint8_t* from, int64_t stride, int num_rows) {
  constexpr int kLanes = kPanelRowBytes / 16, kRows = 32 / kLanes;
  const int lane = threadIdx.x % 32, first_row = lane / kLanes;
  from += first_row * stride + lane % kLanes * 16;
  uint32_t at = shared_address(to) + lane * 16;
#pragma unroll
  for (int row = 0; row < kChunkQueries; row += kRows) {
    if (row + first_row < num_rows) cp_async_16(at + row * kPanelRowBytes, from, true);
    from += kRows * stride;
  }
}

template <class Chunk>
__device__ __forceinline__ void bring_outputs(const HopperBackwardParams& params, const Chunk& chunk, Served& served) {
  const auto bring = [&](uint8_t* to, const void* tensor, const Strides& strides) {
    const auto* from = rows_of(const_cast<void*>(tensor), strides, chunk.of(params), chunk.query_begin);
    bring_rows(to, reinterpret_cast<const uint8_t*>(from), 2 * strides.row, chunk.num_rows(params.work));
  };
  bring(served.out, params.out, params.out_strides);
  bring(served.d_out, params.d_out_rows, params.d_out_strides);
}

template <class Chunk>
__device__ __forceinline__ void bring_sums(const HopperBackwardParams& params, const Chunk& chunk, Served& served) {
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const SumsRow sums = sums_row(params, chunk.of(params), chunk.slot(params), half, chunk.query_begin);
    bring_rows(served.sums[half], sums.at, sums.stride, chunk.num_rows(params.work));
  }
}

// Rounds the sums of a chunk's queries into dq. Those of the first half, which lie there, before anything else is written.
// kBrought: the sums are in `served`, which else is null.
template <class Tile, bool kBrought, class Chunk>
__device__ __forceinline__ void round_sums(const HopperBackwardParams& params, const Chunk& chunk, const Served* served) {
  static_assert(kChunkQueries % 8 == 0);
  const int lane = threadIdx.x % 32, first_row = lane / kLanesOfSums<Tile>;
  const int num_rows = chunk.num_rows(params.work);
  const float scale = params.work.scale;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const uint8_t* from;
    int64_t stride = kPanelRowBytes;
    if constexpr (kBrought) {
      from = served->sums[half] + first_row * kPanelRowBytes;
    } else {
      const SumsRow sums = sums_row(params, chunk.of(params), chunk.slot(params), half, chunk.query_begin + first_row);
      from = sums.at;
      stride = sums.stride;
    }
    from += lane % kLanesOfSums<Tile> * 16;
    uint16_t* to =
        rows_of(params.dq, params.dq_strides, chunk.of(params), chunk.query_begin + first_row) + half * Tile::kHalfColumns;
    // NOTE: the least instructions where rows have been brought, for then a warp waits for little but itself.
    const int num_steps = kBrought ? kChunkQueries : num_rows;
#pragma unroll kBrought ? 4 : 1
    for (int step = 0; step < num_steps; step += kRowsOfSums<Tile>) {
      const int row = step + first_row;
      const bool valid = row < num_rows;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
      if constexpr (kBrought) {
        sum = *reinterpret_cast<const float4*>(from + step * kPanelRowBytes);  // there is memory for all rows
      } else {
        if (valid) sum = __ldcg(reinterpret_cast<const float4*>(from));
        from += kRowsOfSums<Tile> * stride;
        __syncwarp();
      }
      const int column = (4 * lane ^ 8 * row) % Tile::kHalfColumns;  // sums_chunk, and a half of it
      if (valid) {
        *reinterpret_cast<uint2*>(to + column) =
            uint2{pack<Tile::kType>(sum.x * scale, sum.y * scale), pack<Tile::kType>(sum.z * scale, sum.w * scale)};
      }
      to += kRowsOfSums<Tile> * params.dq_strides.row;
    }
  }
}

// Zero sums, where there are any, and the statistics of a chunk's queries. delta of eight queries is the diagonal of a product
// of out and do, to which four lanes bring each row as it lies in memory: the order in which columns are summed is free. The
// upper rows of the operand are the row's next columns, of which the product with their own is the diagonal of the lower
// half: `odd`.
// (The warps that serve heads share the issue slots of those that compute, and have few registers: no more instructions
// than needed, and offsets of 32 bits.)
// kBrought: the rows of out and do are in `served`, which else is null.
template <class Tile, bool kBrought, class Chunk>
__device__ __forceinline__ void prepare(const HopperBackwardParams& params, const Chunk& chunk, const Served* served) {
  constexpr int kLanesOfRow = 4, kRowsOfStep = 32 / kLanesOfRow, kLaneBytes = 16, kStepBytes = kLanesOfRow * kLaneBytes;
  const int lane = threadIdx.x % 32, index = lane % kLanesOfRow, num_rows = chunk.num_rows(params.work);
#pragma unroll 1
  for (int half = 0; half < (has_sums(params, chunk.batch_head) ? 2 : 0); ++half) {
    const int first_row = lane / kLanesOfSums<Tile>;
    const SumsRow sums = sums_row(params, chunk.of(params), chunk.slot(params), half, chunk.query_begin + first_row);
    uint8_t* at = sums.at + lane % kLanesOfSums<Tile> * 16;
#pragma unroll kBrought ? 8 : 4
    for (int row = 0; row < kChunkQueries; row += kRowsOfSums<Tile>) {
      if (row + first_row < num_rows) __stcg(reinterpret_cast<float4*>(at), float4{0.0f, 0.0f, 0.0f, 0.0f});
      at += kRowsOfSums<Tile> * sums.stride;
    }
  }
  const uint8_t *out, *d_out;
  uint32_t out_bytes = kPanelRowBytes, d_out_bytes = kPanelRowBytes;  // from row to row
  if constexpr (kBrought) {
    out = served->out;
    d_out = served->d_out;
  } else {
    const auto rows = [&](const void* tensor, const Strides& strides) {
      return reinterpret_cast<const uint8_t*>(rows_of(const_cast<void*>(tensor), strides, chunk.of(params), chunk.query_begin));
    };
    out = rows(params.out, params.out_strides);
    d_out = rows(params.d_out_rows, params.d_out_strides);
    out_bytes = static_cast<uint32_t>(params.out_strides.row) * 2;
    d_out_bytes = static_cast<uint32_t>(params.d_out_strides.row) * 2;
  }
  const uint32_t odd_row = lane / kLanesOfRow % 2 * kStepBytes;
  const int64_t first_query = static_cast<int64_t>(chunk.batch_head) * params.work.num_queries + chunk.query_begin;
  float lse = 0.0f, delta = 0.0f;  // of query `lane`
  const auto read_lse = [&] {
    if (lane >= num_rows) return;
    lse = params.lse_log2[first_query + lane];
    if (params.d_lse_log2 != nullptr) delta -= params.d_lse_log2[first_query + lane] * kLog2E;
  };
  if constexpr (kBrought) read_lse();
  const int num_steps = kBrought ? kChunkQueries : num_rows;
#pragma unroll kBrought ? 2 : 1
  for (int step = 0; step < num_steps; step += kRowsOfStep) {
    const int query = kBrought ? step + lane / kLanesOfRow : min(step + lane / kLanesOfRow, num_rows - 1);
    const uint32_t of_out = query * out_bytes + index * kLaneBytes;
    const uint32_t of_d_out = query * d_out_bytes + index * kLaneBytes;
    float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll kBrought ? 2 : 1
    for (int byte = 0; byte < 2 * Tile::kHeadDim; byte += kStepBytes) {
      // Neighbouring rows of shared memory in other banks; of global memory so, too: the same sum whoever serves the chunk.
      const uint32_t at = byte ^ odd_row;
      const uint4 a = *reinterpret_cast<const uint4*>(out + (of_out + at));
      const uint4 b = *reinterpret_cast<const uint4*>(d_out + (of_d_out + at));
      mma_m16n8k8<Tile::kType>(even, a.x, a.y, b.x);
      mma_m16n8k8<Tile::kType>(odd, a.x, a.y, b.y);
      mma_m16n8k8<Tile::kType>(even, a.z, a.w, b.z);
      mma_m16n8k8<Tile::kType>(odd, a.z, a.w, b.w);
    }
    // Lane 4 r + t has row r of columns 2 t and 2 t + 1: the one with the diagonal's number gives it to the query's own.
    const int row = lane % kRowsOfStep;
    const float sum = lane / kLanesOfRow % 2 == 0 ? even[0] + odd[2] : even[1] + odd[3];
    const float of_row = __shfl_sync(0xffffffffu, sum, row * kLanesOfRow + row / 2);
    if (lane / kRowsOfStep * kRowsOfStep == step) delta += of_row;
  }
  if constexpr (!kBrought) read_lse();
  if (lane < num_rows) statistics_of(params, chunk.slot(params))[chunk.query_begin + lane] = {lse, delta};
}

__device__ __forceinline__ void count_ready(const HopperBackwardParams& params, int batch_head) {
  fence_async_proxy_global();
  count_up(&params.progress[batch_head].ready);
}

// All warps make the first heads ready, as there is nothing to compute yet.
template <class Tile>
__device__ __forceinline__ void serve_first_heads(const HopperBackwardParams& params) {
  const auto take = [&] { return receive_item(threadIdx.x % 32 == 0 ? atomicAdd(params.next_first_chunk, 1) : 0); };
  const int num_chunks = params.num_first_heads * params.num_chunks;
  for (int number = take(); number < num_chunks; number = take()) {
    const HeadChunk chunk = head_chunk(params, number, 0);
    prepare<Tile, false>(params, chunk, nullptr);
    count_ready(params, chunk.batch_head);
  }
}

// A chunk after those of the first heads. It is made ready, if it is of a head, and before that the sums of the head that had
// its slot are rounded. The end is where there is neither.
__device__ __forceinline__ HeadChunk later_chunk(const HopperBackwardParams& params, int number) {
  return head_chunk(params, number, params.num_first_heads);
}

__device__ __forceinline__ bool is_head(const HopperBackwardParams& params, const HeadChunk& chunk) {
  return chunk.batch_head < params.num_batch_heads;
}

// Whether somebody waits for it: the head, or the one that has its slot.
__device__ __forceinline__ bool is_counted(const HopperBackwardParams& params, const HeadChunk& chunk) {
  return is_head(params, chunk) || has_sums(params, chunk.batch_head - num_early_slots(params));
}

__device__ __forceinline__ HeadChunk chunk_before(const HopperBackwardParams& params, const HeadChunk& chunk) {
  return {chunk.batch_head - params.num_slots, chunk.query_begin};
}

__device__ __forceinline__ PlacedChunk chunk_before(const HopperBackwardParams& params, const PlacedChunk& chunk) {
  const int last = chunk.batch_head - params.num_slots;
  return {{last, chunk.query_begin}, batch_and_head(params.work, last), chunk.its_slot};
}

__device__ __forceinline__ bool rounds_before(const HopperBackwardParams& params, const HeadChunk& chunk) {
  const int last = chunk.batch_head - params.num_slots;
  return last >= 0 && has_sums(params, last);
}

__device__ __forceinline__ bool is_end(const HopperBackwardParams& params, const HeadChunk& chunk) {
  return !is_head(params, chunk) && !rounds_before(params, chunk);
}

__device__ __forceinline__ int take_chunk(const HopperBackwardParams& params) {
  return threadIdx.x % 32 == 0 ? atomicAdd(params.next_chunk, 1) : 0;
}

// Makes the other heads ready and rounds the sums of all, chunk by chunk: what all warps do once there is nothing to compute.
template <class Tile>
__device__ __forceinline__ void serve_heads(const HopperBackwardParams& params) {
  for (int number = receive_item(take_chunk(params));;) {
    const HeadChunk chunk = later_chunk(params, number);
    if (is_end(params, chunk)) return;
    if (rounds_before(params, chunk)) {
      const HeadChunk before = chunk_before(params, chunk);
      wait_for_count(&params.progress[before.batch_head].done, params.work.num_jobs);
      round_sums<Tile, false>(params, before, nullptr);
      __syncwarp();
    }
    if (is_head(params, chunk)) prepare<Tile, false>(params, chunk, nullptr);
    const int next = take_chunk(params);
    if (is_counted(params, chunk)) count_ready(params, chunk.batch_head);
    number = receive_item(next);
  }
}

// The same by the two warps that do nothing else. While one serves a chunk the next one's rows are on their way: its sums if
// they are complete already. It waits for none before it has counted the chunk it has, for which others may wait.
template <class Tile>
__device__ __forceinline__ void serve_heads_ahead(const HopperBackwardParams& params, Served& served) {
  const auto done = [&](const HeadChunk& chunk) { return &params.progress[chunk.batch_head - params.num_slots].done; };
  const auto receive = [&](int taken) {
    const HeadChunk chunk = later_chunk(params, receive_item(taken));
    return PlacedChunk{chunk, chunk.of(params), chunk.slot(params)};
  };
  PlacedChunk chunk = receive(take_chunk(params));
  bool late = rounds_before(params, chunk);  // its sums are not on their way yet
  if (is_head(params, chunk)) bring_outputs(params, chunk, served);
  cp_async_commit();
  int taken = take_chunk(params);
  while (!is_end(params, chunk)) {
    if (late) {
      wait_for_count(done(chunk), params.work.num_jobs);
      bring_sums(params, chunk_before(params, chunk), served);
      cp_async_commit();
      cp_async_wait<0>();
    } else {
      cp_async_wait<1>();  // all but `out` and `d_out`
    }
    __syncwarp();
    if (rounds_before(params, chunk)) round_sums<Tile, true>(params, chunk_before(params, chunk), &served);
    __syncwarp();
    const PlacedChunk next = receive(taken);
    taken = take_chunk(params);
    late = rounds_before(params, next);
    if (late && has_come_to(done(next), params.work.num_jobs)) {
      bring_sums(params, chunk_before(params, next), served);
      late = false;
    }
    cp_async_commit();
    cp_async_wait<1>();  // all but those sums
    __syncwarp();
    if (is_head(params, chunk)) prepare<Tile, true>(params, chunk, &served);
    __syncwarp();
    if (is_head(params, next)) bring_outputs(params, next, served);
    cp_async_commit();
    if (is_counted(params, chunk)) count_ready(params, chunk.batch_head);
    chunk = next;
  }
}

// dq of 64 queries and the 64 columns of `panel`: ds k, a group committed.
template <class Tile>
__device__ __forceinline__ void issue_dq(float (&dq)[kPanelColumns / 2], const typename Tile::Shared& shared, int exchange,
                                         int row_stage, int panel) {
  wgmma_fence();
#pragma unroll
  for (int keys = 0; keys < Tile::kGroups; ++keys) {
    const uint64_t a = row_descriptor(shared.ds[exchange][keys]);
    const uint64_t b = column_descriptor(shared.k[row_stage][keys][panel], Tile::kGroupPanelBytes);
#pragma unroll
    for (int step = 0; step < kGroupRows / 16; ++step) {
      wgmma<Tile::kType, true>(dq, advanced(a, step * 32), advanced(b, step * 16 * kPanelRowBytes), keys + step > 0);
    }
  }
  wgmma_commit();
}

// Adds dq of 64 queries and 64 columns to the sums in two steps, through `staging`, which the copy engine reads until the
// next call. Every warp sends its own 16 rows through its own part, one half of a head's columns after the other.
constexpr int kWarpStagingBytes = kSumsBoxRows * kPanelColumns * 4;

template <class Tile>
__device__ __forceinline__ void stage_sums(const float (&dq)[kPanelColumns / 2], uint8_t* staging, int first_query) {
  constexpr int kChunks = Tile::kHalfColumns / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroupThreads / 32;
  if (lane == 0) bulk_wait_read();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    const uint32_t at = shared_address(staging + warp * kWarpStagingBytes + row * Tile::kHalfColumns * 4) +
                        sums_chunk<Tile>(first_query + row, 0) * 32 + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      store_shared((at ^ (n % kChunks * 32)) + n / kChunks * (kWarpStagingBytes / Tile::kHalves), dq[4 * n + 2 * i],
                   dq[4 * n + 2 * i + 1]);
    }
  }
}

// The second step, for which dq is no longer needed. `places`: of the halves.
template <class Tile>
__device__ __forceinline__ void send_sums(const HopperBackwardParams& params, const uint8_t* staging, const SumsPlace* places,
                                          int first_query) {
  const int warp = threadIdx.x % kGroupThreads / 32, query = first_query + warp * kSumsBoxRows;
  fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    if (query < params.work.num_queries) {
#pragma unroll
      for (int half = 0; half < Tile::kHalves; ++half) {
        const SumsPlace place = places[half];
        bulk_add(params.sums[place.tensor], staging + warp * kWarpStagingBytes + half * (kWarpStagingBytes / Tile::kHalves), 0,
                 query, place.head, place.batch);
      }
    }
    bulk_commit();
  }
}

// The warpgroup that computes dq, where there is one.
template <class Tile>
__device__ __forceinline__ void compute_dq_sums(const HopperBackwardParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kRowStages> rows;
  RingPosition<Tile::kExchanges> exchange;
  float dq[kPanelColumns / 2];
  for (;; rows.advance()) {
    barrier_wait(shared.rows_full[rows.stage], rows.parity);
    const auto& slot = shared.slot[rows.stage];
    if (slot.head < 0) return;
    const int column_begin = slot.job[COLUMN_BEGIN], num_blocks = slot.job[NUM_BLOCKS];
    const bool adds = has_sums(params, slot.head);
    for (int block = 0; block < num_blocks; ++block, exchange.advance()) {
      barrier_wait(shared.ds_full[exchange.stage], exchange.parity);
      if (!adds) {
        release(shared.ds_empty[exchange.stage]);
        continue;
      }
      fence_async_proxy();  // of what the others wrote: nearer to their loop it would cost more
      issue_dq<Tile>(dq, shared, exchange.stage, rows.stage, 0);
      wgmma_wait<0>();
      release(shared.ds_empty[exchange.stage]);
      stage_sums<Tile>(dq, shared.dq[0], column_begin);
      send_sums<Tile>(params, shared.dq[0], shared.sums[rows.stage], column_begin + block * Tile::kBlockN);
    }
    if (threadIdx.x % 32 == 0) bulk_wait();
    release(shared.rows_done[rows.stage]);  // here as many slots as places of rows
  }
}

// A warpgroup's part of a job: 64 keys, and the logits of a block.
template <class Tile>
struct BackwardRows : DkdvRows<Tile> {
  float s[DkdvRows<Tile>::kLogits];
};

template <class Tile, bool kSums>
struct BackwardLoop {
  static constexpr int kLogits = BackwardRows<Tile>::kLogits, kSteps = BackwardRows<Tile>::kSteps, kHeadDim = Tile::kHeadDim;
  static constexpr DType kType = Tile::kType;

  const HopperBackwardParams& params;
  typename Tile::Shared& shared;
  const GroupJob& job;
  const int batch_head, group, row_stage, slot;
  RingPosition<Tile::kStages>& ring;
  RingPosition<Tile::kExchanges>& exchange;
  const float scale_log2;
  const uint32_t origin;  // of shared memory, in chunks of 16 bytes

  __device__ __forceinline__ const float4* statistics() const {
    return reinterpret_cast<const float4*>(shared.statistics[ring.stage]) + threadIdx.x % 4;
  }
  __device__ __forceinline__ void issue_logits(float (&s)[kLogits]) {
    barrier_wait(shared.full[ring.stage], ring.parity);
    issue_rows_product<kType, kHeadDim>(s, shared.k[row_stage][group][0], shared.q[ring.stage][0]);
  }
  __device__ __forceinline__ void issue_dp(float (&dp)[kLogits]) {
    issue_rows_product<kType, kHeadDim>(dp, shared.v[row_stage][group][0], shared.d_out[ring.stage][0]);
  }
  // Columns are queries, rows this group's keys: those beyond its own must not count in dq.
  __device__ __forceinline__ void mask(float (&s)[kLogits], int block) const {
    const int first_row = threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
    if (job.masked(block)) mask_keys(s, params.work, job.column_begin + block * Tile::kBlockN, job.row_begin + first_row);
    if (job.num_rows < kGroupRows) {
#pragma unroll
      for (int i = 0; i < kLogits; ++i) {
        if (first_row + i / 2 % 2 * 8 >= job.num_rows) s[i] = -INFINITY;
      }
    }
  }
  __device__ __forceinline__ void exponentiate(BackwardRows<Tile>& rows) const {
    rows.exponentiate(rows.s, statistics(), scale_log2);
  }
  // ds, and where the dq product finds it once it is shared.
  __device__ __forceinline__ void differentiate(BackwardRows<Tile>& rows) {
    rows.differentiate(rows.s, statistics());
    if (!kSums) return;
    barrier_wait(shared.ds_empty[exchange.stage], exchange.parity ^ 1);
    const int lane = threadIdx.x % 32, chunk = threadIdx.x % kGroupThreads / 32 * 2 + lane / 8 % 2;
    const int first_query = lane / 16 * 8 + lane % 8;
    uint8_t* panel = shared.ds[exchange.stage][group];
#pragma unroll
    for (int step = 0; step < BackwardRows<Tile>::kSteps; ++step) {
      store_transposed(panel + swizzled_chunk(16 * step + first_query, chunk), rows.ds[step]);
    }
  }
  __device__ __forceinline__ void share_ds() {
    if (!kSums) return;
    if (!Tile::kDqGroup) fence_async_proxy();
    release(shared.ds_full[exchange.stage]);
    exchange.advance();
  }
  __device__ __forceinline__ void stage_dq(const float (&dq)[kPanelColumns / 2]) const {
    stage_sums<Tile>(dq, shared.dq[group], job.column_begin);
  }
  __device__ __forceinline__ void send_dq(int block) const {
    send_sums<Tile>(params, shared.dq[group], &shared.sums[slot][group], job.column_begin + block * Tile::kBlockN);
  }

  // Writes the group's rows of dv or dk.
  __device__ __forceinline__ void store(const float (&accumulator)[kHeadDim / 2], float factor, void* tensor,
                                        const Strides& strides) const {
    uint8_t* staging = Tile::kNextInPlace ? shared.dq[group] : shared.v[row_stage][group][0];
    int panel_bytes = Tile::kGroupPanelBytes;
    if (Tile::kNextInPlace) {  // every warp's rows through the part whose sums it sends
      panel_bytes = kWarpStagingBytes / Tile::kPanels;
      staging += threadIdx.x % kGroupThreads / 32 * (kWarpStagingBytes - panel_bytes);
    }
    const float factors[2] = {factor, factor};
    __syncwarp();
    store_rows<kType>(accumulator, factors, staging, panel_bytes,
                      rows_of(tensor, strides, params.work, batch_head, job.row_begin), strides.row, job.num_rows);
  }
  __device__ __forceinline__ void store_dv(const BackwardRows<Tile>& rows) const {
    store(rows.dv, 1.0f, params.dv, params.dv_strides);
  }
  __device__ __forceinline__ void store_dk(const BackwardRows<Tile>& rows) const {
    store(rows.dk, params.work.scale, params.dk, params.dk_strides);
  }
  // The parts of `staging` are this warp's own again.
  __device__ __forceinline__ void wait_until_sent() const {
    if (threadIdx.x % 32 == 0) bulk_wait_read();
    __syncwarp();
  }

  // In the order they are issued: s(0), dp(0), then for each block b: dv(b), s(b + 1), dk(b), dp(b + 1).
  __device__ __forceinline__ void run(BackwardRows<Tile>& rows) {
    issue_logits(rows.s);
    issue_dp(rows.dp);
    wgmma_wait<1>();
    for (int block = 0;; ++block) {
      mask(rows.s, block);
      turn_wait<Tile::kGroups>(group);
      exponentiate(rows);
      turn_pass<Tile::kGroups>(group);
      issue_columns_product<kType>(rows.dv, rows.p, shared.d_out[ring.stage][0]);
      wgmma_wait<1>();  // dp(block), and before it dk(block - 1)
      if (block > 0) release(shared.empty[ring.last_stage()]);
      differentiate(rows);
      const int stage = ring.stage;
      ring.advance();
      if (block + 1 == job.num_blocks) {
        issue_columns_product<kType>(rows.dk, rows.ds, shared.q[stage][0]);
        share_ds();
        wgmma_wait<0>();
        release(shared.empty[stage]);
        return;
      }
      issue_logits(rows.s);
      issue_columns_product<kType>(rows.dk, rows.ds, shared.q[stage][0]);
      issue_dp(rows.dp);
      share_ds();
      wgmma_wait<2>();  // s(block + 1), and before it dv(block)
    }
  }

  // From here on products at head dim 128, where descriptors are made anew each time: there are no registers to keep them.
  static constexpr uint32_t kPanelChunks = Tile::kBlockPanelBytes / 16, kTileChunks = Tile::kPanels * kPanelChunks;
  static constexpr uint32_t kV = Tile::kGroups * kTileChunks, kQ = 2 * kV, kDOut = kQ + Tile::kStages * kTileChunks;
  static constexpr uint32_t kDs = kDOut + Tile::kStages * kTileChunks;  // chunks from `origin` on, as Shared has its tiles
  static_assert(Tile::kDqGroup || (Tile::kGroupPanelBytes == Tile::kBlockPanelBytes && Tile::kRowStages == 1));
  static constexpr uint32_t kStepChunks = 16 * kPanelRowBytes / 16;  // of 16 rows

  // The group's keys (from `tile` on) times a block's queries.
  __device__ __forceinline__ void issue_with_keys(float (&d)[kLogits], uint32_t tile, uint32_t block_tile) const {
    const uint32_t a = opaque(origin + group * kTileChunks) + tile + kRowDescriptor;
    const uint32_t b = opaque(origin) + block_tile + kRowDescriptor;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t at = step / 4 * kPanelChunks + step % 4 * 2;
      wgmma<kType, false>(d, descriptor_at(a + at), descriptor_at(b + at), step > 0);
    }
    wgmma_commit();
  }
  // d += a b, a in registers.
  __device__ __forceinline__ void issue_with_block(float (&d)[kHeadDim / 2], const uint32_t (&a)[kSteps][4],
                                                   uint32_t block_tile) const {
    const uint32_t b = opaque(origin) + block_tile + kColumnDescriptor<Tile::kBlockPanelBytes>;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) wgmma<kType, true>(d, a[step], descriptor_at(b + step * kStepChunks), true);
    wgmma_commit();
  }
  // dq of a block and 64 of its columns: ds k.
  __device__ __forceinline__ void issue_dq(float (&dq)[kPanelColumns / 2], int exchange_stage) const {
    const uint32_t a = opaque(origin) + kDs + exchange_stage * Tile::kGroups * kPanelChunks + kRowDescriptor;
    const uint32_t b = opaque(origin + group * kPanelChunks) + kColumnDescriptor<Tile::kGroupPanelBytes>;
    wgmma_fence();
#pragma unroll
    for (int keys = 0; keys < Tile::kGroups; ++keys) {
#pragma unroll
      for (int step = 0; step < kGroupRows / 16; ++step) {
        wgmma<kType, true>(dq, descriptor_at(a + keys * kPanelChunks + step * 2),
                           descriptor_at(b + keys * kTileChunks + step * kStepChunks), keys + step > 0);
      }
    }
    wgmma_commit();
  }

  // The same with dq(b - 1) after dk(b), for which registers suffice only while there is no dp, then s(b + 1) and dp(b + 1). One
  // block late, so that the warpgroups need not keep pace. The first one is a product of whatever lies there and is not
  // added: leaving it out takes registers that there are not. Keys and values are given back to the fetching warp as soon as they
  // have been read, and dv is stored while the last dq is computed.
  __device__ __forceinline__ void run_with_dq(BackwardRows<Tile>& rows) {
    float dq[kPanelColumns / 2];
    const auto issue_s = [&] { issue_with_keys(rows.s, 0, kQ + ring.stage * kTileChunks); };
    const auto issue_dp = [&] { issue_with_keys(rows.dp, kV, kDOut + ring.stage * kTileChunks); };
    barrier_wait(shared.full[ring.stage], ring.parity);
    issue_s();
    issue_dp();
    wgmma_wait<1>();
    RingPosition<Tile::kExchanges> last = exchange;
    for (int block = 0;; ++block) {
      const RingPosition<Tile::kExchanges> here = exchange;
      const int stage = ring.stage;
      mask(rows.s, block);
      turn_wait<Tile::kGroups>(group);
      exponentiate(rows);
      turn_pass<Tile::kGroups>(group);
      issue_with_block(rows.dv, rows.p, kDOut + stage * kTileChunks);
      wgmma_wait<1>();  // dp(block)
      differentiate(rows);
      issue_with_block(rows.dk, rows.ds, kQ + stage * kTileChunks);
      share_ds();
      if (kSums && block > 0) barrier_wait(shared.ds_full[last.stage], last.parity);
      if (kSums) issue_dq(dq, last.stage);
      ring.advance();
      if (block + 1 < job.num_blocks) barrier_wait(shared.full[ring.stage], ring.parity);
      wgmma_wait<0>();
      if (block + 1 == job.num_blocks) {
        release(shared.empty[stage]);
        release(shared.values_empty);
        if (!kSums) {
          release(shared.rows_empty[0]);
          store_dv(rows);
          return;
        }
        if (block > 0) {
          release(shared.ds_empty[last.stage]);
          stage_dq(dq);
          send_dq(block - 1);
        }
        barrier_wait(shared.ds_full[here.stage], here.parity);
        issue_dq(dq, here.stage);
        wait_until_sent();
        store_dv(rows);
        wgmma_wait<0>();
        release(shared.ds_empty[here.stage]);
        release(shared.rows_empty[0]);
        stage_dq(dq);
        send_dq(block);
        wait_until_sent();
        return;
      }
      issue_s();  // before anything else: nothing is under way
      release(shared.empty[stage]);
      if (kSums && block > 0) {
        release(shared.ds_empty[last.stage]);
        stage_dq(dq);
      }
      last = here;
      issue_dp();
      if (kSums && block > 0) send_dq(block - 1);
      wgmma_wait<1>();  // s(block + 1)
    }
  }
};

// A job whose slot is written. kSums: ds goes on to dq, or to the warpgroup that computes it.
template <class Tile, bool kSums>
__device__ __forceinline__ void compute_job(const HopperBackwardParams& params, typename Tile::Shared& shared, int batch_head,
                                            int group, int row_stage, int slot, RingPosition<Tile::kStages>& ring,
                                            RingPosition<Tile::kExchanges>& exchange) {
  const GroupJob job(shared.slot[slot], group);
  BackwardRows<Tile> rows;
  set_zero(rows.dk), set_zero(rows.dv);
  BackwardLoop<Tile, kSums> loop{params, shared, job, batch_head, group, row_stage, slot, ring, exchange,
                                 params.work.scale * kLog2E, shared_address(&shared) >> 4};
  if constexpr (Tile::kNextInPlace) {
    if (job.num_blocks > 0) {
      loop.run_with_dq(rows);
    } else {
      release(shared.values_empty);
      release(shared.rows_empty[row_stage]);
      loop.store_dv(rows);
    }
    loop.store_dk(rows);
    if (threadIdx.x % 32 == 0) bulk_wait();
  } else {
    if (job.num_blocks > 0) loop.run(rows);
    group_sync(group);
    loop.store_dv(rows);
    loop.store_dk(rows);
    fence_async_proxy();
  }
  release(shared.rows_done[slot]);
}

template <class Tile>
__device__ __forceinline__ void compute_backward(const HopperBackwardParams& params, typename Tile::Shared& shared) {
  const int group = uniform(threadIdx.x / kGroupThreads);
  RingPosition<Tile::kRowStages> row_ring;
  RingPosition<Tile::kSlots> slots;
  RingPosition<Tile::kStages> ring;
  RingPosition<Tile::kExchanges> exchange;
  if (group + 1 == Tile::kGroups) turn_pass<Tile::kGroups>(group);
  for (;; row_ring.advance(), slots.advance()) {
    barrier_wait(shared.rows_full[row_ring.stage], row_ring.parity);
    const int batch_head = uniform(shared.slot[slots.stage].head);
    if (batch_head < 0) return;
    const int row_stage = row_ring.stage;
    if (Tile::kDqGroup || has_sums(params, batch_head)) {
      compute_job<Tile, true>(params, shared, batch_head, group, row_stage, slots.stage, ring, exchange);
    } else if constexpr (!Tile::kDqGroup) {
      compute_job<Tile, false>(params, shared, batch_head, group, row_stage, slots.stage, ring, exchange);
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kBlocksPerSM)
    hopper_backward_kernel(const __grid_constant__ HopperBackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kGroups, kDqWarps = Tile::kDqGroup ? 4 : 0;
    constexpr int kCounting = Tile::kNextInPlace;  // the warp that counts jobs
    barriers_init(shared.rows_full, 1), barriers_init(shared.rows_done, kWarps + kDqWarps);
    barriers_init(shared.rows_empty, Tile::kNextInPlace ? kWarps + kCounting : 1), barrier_init(shared.values_empty, kWarps);
    barriers_init(shared.full, 1 + 32);  // the copy engine's arrival, and every lane's for the statistics
    barriers_init(shared.empty, kWarps);
    barriers_init(shared.ds_full, kWarps), barriers_init(shared.ds_empty, Tile::kDqGroup ? kDqWarps : kWarps);
    fence_barrier_init();
  }
  __syncthreads();
  launch_dependents();  // the dq pass of the last heads: its thread blocks begin where one of this launch has ended
  const int group = threadIdx.x / kGroupThreads;
  if (group < Tile::kGroups) {
    take_registers<Tile::kRegistersOfCompute>();
    serve_first_heads<Tile>(params);
    compute_backward<Tile>(params, shared);
    serve_heads<Tile>(params);
  } else if (Tile::kDqGroup && group == Tile::kGroups) {
    give_registers<Tile::kRegistersOfDq>();
    compute_dq_sums<Tile>(params, shared);
  } else {
    give_registers<Tile::kRegistersOfFetch>();
    const int warp = threadIdx.x % kGroupThreads / 32;
    if (warp == 0) {
      fetch_backward<Tile>(params, shared);
    } else if (warp == 1) {
      count_jobs<Tile>(params, shared);
    } else {
      serve_first_heads<Tile>(params);
      if constexpr (Tile::kServesAhead) {
        serve_heads_ahead<Tile>(params, shared.served.of_warp[thread_again() / 32 % 2]);
      } else {
        serve_heads<Tile>(params);
      }
    }
  }
}

}  // namespace hmar
